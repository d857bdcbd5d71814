"""What a service's OpenAPI document says of errors: every one is a problem, as `application/problem+json`."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from services.contracts.errors import RatchetError
from services.contracts.problems import PROBLEM_MEDIA_TYPE, Problem

METHODS = frozenset({"get", "put", "post", "patch", "delete"})
FRAMEWORK_SCHEMAS = ("HTTPValidationError", "ValidationError")
"""FastAPI documents its own answer to a bad request; the services' handlers answer with a problem instead."""
INVALID = "Invalid input: `field` names what is wrong."


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may answer with these statuses, beside 422."""
    titles: dict[int, list[str]] = {}
    for error in _errors():
        titles.setdefault(error.status, []).append(error.title)
    return {
        status: {"model": Problem, "description": "; ".join(dict.fromkeys(titles.get(status, ["Problem"])))}
        for status in statuses
    }


def document_problems(app: FastAPI) -> None:
    """Have `/openapi.json` give problems their media type, and 422 its true body."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            schemas: dict[str, Any] = document.setdefault("components", {}).setdefault("schemas", {})
            problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(problem.pop("$defs", {}))
            schemas["Problem"] = problem
            for path in document["paths"].values():
                for method in METHODS & path.keys():
                    _tell_problems(path[method]["responses"])
            for name in FRAMEWORK_SCHEMAS:
                schemas.pop(name, None)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi


def _tell_problems(responses: dict[str, Any]) -> None:
    reference = {"$ref": "#/components/schemas/Problem"}
    for status, response in responses.items():
        content = response.get("content", {})
        said = content.get("application/json", {}).get("schema", {}).get("$ref", "").rsplit("/", 1)[-1]
        if said in ("Problem", *FRAMEWORK_SCHEMAS):
            del content["application/json"]
            content[PROBLEM_MEDIA_TYPE] = {"schema": reference}
            if said != "Problem" and status == "422":
                response["description"] = INVALID


def _errors() -> list[type[RatchetError]]:
    return sorted(RatchetError.__subclasses__(), key=lambda error: error.__name__)
