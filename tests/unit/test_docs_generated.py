"""What `make docs` writes is what lies in the repository, and says what the code says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from scripts.api_docs import guarded_routes, kind_of
from scripts.reference_docs import between, recipe_keys
from services.contracts.recipes import Recipe
from tests.fixtures.doc_commands import ROOT


@pytest.mark.parametrize("module", ["scripts.api_docs", "scripts.reference_docs"])
def test_the_pages_are_what_the_code_says(module: str) -> None:
    checked = subprocess.run(
        [sys.executable, "-m", module, "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr[-2000:]


def test_every_key_of_a_recipe_has_a_sentence() -> None:
    silent = [key for key, field in recipe_keys(Recipe) if not field.description]
    assert not silent, f"without a description: {silent}"


def test_a_route_s_token_is_read_from_the_route_and_not_from_a_list() -> None:
    from fastapi import Depends, FastAPI
    from pydantic import SecretStr

    from services.platform.auth import require_token

    app = FastAPI()

    @app.get("/open")
    def open_route() -> None: ...  # pyright: ignore[reportUnusedFunction]

    @app.put("/control", dependencies=[Depends(require_token(SecretStr("t" * 16)))])
    def control_route() -> None: ...  # pyright: ignore[reportUnusedFunction]

    assert guarded_routes(app) == {("/control", "put")}


def test_types_are_told_in_words() -> None:
    used: dict[str, object] = {}
    schema = {"anyOf": [{"type": "array", "items": {"$ref": "#/components/schemas/Pair"}}, {"type": "null"}]}
    assert kind_of(schema, used) == "list of [Pair](#pair) or null"
    assert list(used) == ["Pair"]
    assert kind_of({"type": "integer", "minimum": 1}, {}) == "integer ≥ 1"


def test_only_what_is_between_the_marks_is_replaced() -> None:
    page = "before\n<!-- written by `make docs`: begin -->\nold\n<!-- written by `make docs`: end -->\nafter\n"
    assert between(page, "new") == page.replace("old", "new")
