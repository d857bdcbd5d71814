#!/usr/bin/env python3
"""Write docs/api/*.md from each service's OpenAPI document. `make docs` runs it.

    python -m scripts.api_docs [--check]

--check changes nothing, and exits 1 naming the pages that are not what the code says.
"""

from __future__ import annotations

import ast
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.markdown import NOTE, ROOT, anchor, cell, shown, table, write

API = ROOT / "docs" / "api"
SERVICES = ("orchestrator", "generator", "reward", "trainer")
METHODS = ("get", "put", "post", "patch", "delete")
HEALTH = ("/health/live", "/health/ready", "/metrics")
ABOUT = {
    "orchestrator": "Runs, iterations, data sets, what can be read of them, and their events. It holds no model.",
    "generator": "The policy, behind OpenAI's routes; sampling of rollouts; the hot swap.",
    "reward": "Rewards and log-probs of responses, by scorers that were proven when they were loaded.",
    "trainer": "Training jobs: import, SFT, reward model, DPO. One runs at a time.",
}
STREAMED = {
    "application/x-ndjson": ("RolloutLine", "each line a"),
    "text/event-stream": ("Event", "the `data` of each event an"),
}
"""Media types of streams: what one piece of them is."""


def build_apps() -> dict[str, Any]:
    """The four apps, made but not started: nothing is connected to and no model is loaded."""
    with tempfile.TemporaryDirectory() as store:
        os.environ.update(RATCHET_TOKEN="only-for-the-documentation", RATCHET_STORE_URL=store)
        from services.generator.app import create_app as generator
        from services.generator.settings import GeneratorSettings
        from services.orchestrator.app import create_app as orchestrator
        from services.orchestrator.settings import OrchestratorSettings
        from services.platform.settings import settings_from_environment
        from services.reward.app import create_app as reward
        from services.reward.settings import RewardSettings
        from services.trainer.app import build_app as trainer
        from services.trainer.settings import TrainerSettings

        return {
            "orchestrator": orchestrator(settings_from_environment(OrchestratorSettings)),
            "generator": generator(settings_from_environment(GeneratorSettings)),
            "reward": reward(settings_from_environment(RewardSettings)),
            "trainer": trainer(settings_from_environment(TrainerSettings)),
        }


def pages() -> dict[Path, str]:
    """Every page, by its path."""
    return {API / f"{name}.md": page(name, app) for name, app in build_apps().items()}


def page(service: str, app: Any) -> str:
    """One service's page."""
    document, guarded = app.openapi(), guarded_routes(app)
    used: dict[str, dict[str, Any]] = {}
    routes = [
        "\n".join(route_lines(path, method, operation, (path, method) in guarded, document, used))
        for path, operations in document["paths"].items()
        if path not in HEALTH
        for method, operation in operations.items()
        if method in METHODS
    ]
    schemas = document.get("components", {}).get("schemas", {}) | streamed_schemas()
    parts = [
        NOTE,
        f"# API of the {'reward service' if service == 'reward' else service}",
        ABOUT[service],
        "The running service shows the same at `/docs`, and gives it to programs at `/openapi.json`. **Token** routes "
        "need the header `Authorization: Bearer TOKEN`; the others need none. `GET /health/live`, `GET /health/ready` "
        "(503 with the reason in `detail` when not) and `GET /metrics` are the same in every service. `X-Request-Id` "
        "comes back with every answer; the one that was sent, if there was one.",
        "## Routes",
        *routes,
        "## Problems",
        "Every error is `application/problem+json` (RFC 9457), except on the OpenAI routes, which answer as OpenAI "
        "does. `field` names what is at fault. Those of this service:"
        if service == "generator"
        else "Every error is `application/problem+json` (RFC 9457); `field` names what is at fault. Those of this "
        "service:",
        table(("status", "code", "when"), problem_rows(service)),
        "## Types",
        *(schema_lines(name, schemas[name], schemas) for name in reachable(sorted(used), schemas)),
    ]
    return "\n\n".join(parts) + "\n"


def streamed_schemas() -> dict[str, Any]:
    """The contracts of `STREAMED`, which an OpenAPI document cannot name, as schemas."""
    from services.contracts.jobs import Event
    from services.contracts.rollouts import RolloutLine

    found: dict[str, Any] = {}
    for kind in (Event, RolloutLine):
        schema = kind.model_json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
        found |= schema.pop("$defs", {}) | {kind.__name__: schema}
    return found


def guarded_routes(app: Any) -> set[tuple[str, str]]:
    """Path and method of every route that calls the token check, read from the routes themselves."""

    def checks(dependant: Any) -> Iterator[str]:
        for inner in dependant.dependencies:
            yield getattr(inner.call, "__qualname__", "")
            yield from checks(inner)

    return {
        (route.path_format, method.lower())
        for route in app.routes
        if hasattr(route, "dependant") and any(name.startswith("require_token.") for name in checks(route.dependant))
        for method in route.methods
    }


def route_lines(
    path: str, method: str, operation: dict[str, Any], token: bool, document: dict[str, Any], used: dict[str, Any]
) -> Iterator[str]:
    """Heading, what it does, parameters, body and answers of a route."""
    yield f"### {method.upper()} {path}"
    yield ""
    about = [operation.get("summary", "").rstrip(".") + ".", operation.get("description", "").strip()]
    yield f"{' '.join(filter(None, about))}{' **Token.**' if token else ''}"
    yield ""
    parameters = [
        (f"`{p['name']}`", p["in"], kind_of(p["schema"], used), required(p), cell(p.get("description", "")))
        for p in operation.get("parameters", [])
    ]
    if parameters:
        yield table(("parameter", "in", "type", "default", "what"), parameters)
        yield ""
    if body := operation.get("requestBody"):
        kinds = [
            f"{kind_of(content.get('schema', {}), used)} as `{media}`" for media, content in body["content"].items()
        ]
        yield f"Body: {', or '.join(kinds)}."
        yield ""
    answers = [
        f"{status} {answer_of(answer, used)}"
        for status, answer in operation["responses"].items()
        if not is_problem(status)
    ]
    yield f"Answer: {'; '.join(answers)}."
    told = sorted({*filter(is_problem, operation["responses"]), *(["401"] if token else [])})
    if told:
        yield ""
        yield f"[Problems](#problems): {', '.join(told)}."


def is_problem(status: str) -> bool:
    """Whether an answer of this status is an error."""
    return status.isdigit() and int(status) >= 400


def answer_of(answer: dict[str, Any], used: dict[str, Any]) -> str:
    """An answer's type and media type."""
    told: list[str] = []
    for media, content in answer.get("content", {}).items():
        if media in STREAMED:
            name, what = STREAMED[media]
            told.append(f"`{media}`, {what} {kind_of({'$ref': name}, used)}")
            continue
        kind = kind_of(content.get("schema", {}), used)
        told.append(f"{kind} as `{media}`" if kind else f"`{media}`")
    return ", or ".join(told) or "without a body"


def required(parameter: dict[str, Any]) -> str:
    """A parameter's default, or that it has to be given."""
    if parameter.get("required"):
        return "required"
    return shown(parameter["schema"].get("default"))


def kind_of(schema: dict[str, Any], used: dict[str, Any]) -> str:
    """A schema's type in words; contracts are links to their tables, and are noted in `used`."""
    if reference := schema.get("$ref"):
        name = reference.rsplit("/", 1)[-1]
        used[name] = schema
        return f"[{name}](#{anchor(name)})"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            kinds = dict.fromkeys(kind_of(each, used) for each in schema[key])
            return " or ".join(kind for kind in kinds if kind)
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema.get("type", "")
    if kind == "array":
        if "prefixItems" in schema:
            return "[" + ", ".join(kind_of(each, used) for each in schema["prefixItems"]) + "]"
        return f"list of {kind_of(schema.get('items', {}), used) or 'anything'}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"map of {kind_of(schema['additionalProperties'], used) or 'anything'}"
    return kind + bounds(schema)


def bounds(schema: dict[str, Any]) -> str:
    """Limits of a number, as text."""
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    told = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    return f" {', '.join(told)}" if told else ""


def reachable(names: list[str], schemas: dict[str, Any]) -> list[str]:
    """The schemas named and those they use, in order of name."""
    found: dict[str, None] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found or name not in schemas or name in ("HTTPValidationError", "ValidationError"):
            continue
        found[name] = None
        waiting += [reference.rsplit("/", 1)[-1] for reference in references(schemas[name])]
    return sorted(found)


def references(value: Any) -> Iterator[str]:
    """Every `$ref` inside a schema."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "$ref":
                yield inner
            else:
                yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def schema_lines(name: str, schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    """A contract: what it is, and a table of its fields."""
    lines = [f"### {name}", "", cell(schema.get("description", "")).strip()]
    fields = [
        (
            f"`{key}`",
            kind_of(field, {}),
            "required" if key in schema.get("required", []) else shown(field.get("default")),
            cell(field.get("description", "")),
        )
        for key, field in schema.get("properties", {}).items()
    ]
    if fields:
        lines += ["", table(("field", "type", "default", "what"), fields)]
    elif kind := kind_of({k: v for k, v in schema.items() if k != "description"}, {}):
        lines += ["", f"One of: {kind}." if "enum" in schema else kind]
    return "\n".join(line for i, line in enumerate(lines) if line or lines[i - 1])


def problem_rows(service: str) -> list[tuple[str, ...]]:
    """The errors that a service's modules and the platform's name, with their docstrings."""
    from services.contracts import errors

    classes = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.RatchetError)
    }
    named = {"Unauthorized", "InvalidInput"}  # raised for every service by the platform: token, body and parameters
    for path in (ROOT / "services" / service).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                named.add(ast.unparse(node.exc.func).rsplit(".", 1)[-1])
    rows = [
        (str(kind.status), f"`{kind.code}`", cell(kind.__doc__ or ""))
        for name, kind in classes.items()
        if name in named and name not in ("RatchetError", "Cancelled", "Fenced", "JobFailed")
    ]
    rows.append(("any", "`http`", "No such route, or another method than it takes."))
    rows.append(("500", "`internal`", "A fault of ours; the service's log has it under the request id."))
    return sorted(rows)


if __name__ == "__main__":
    code = write(pages, sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # torch and the batch thread need no orderly end here
