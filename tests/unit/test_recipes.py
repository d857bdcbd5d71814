"""Every shipped recipe is valid to the last key."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from services.contracts.recipes import Recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
MODELS_AND_PROMPTS = {
    "policy": "models/sft",
    "reward_model": "models/rm",
    "prompts": {"path": "prompts.jsonl"},
    "heldout": {"path": "heldout.jsonl"},
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_shipped_recipe_needs_only_models_and_prompts(path: Path) -> None:
    recipe = Recipe.model_validate(MODELS_AND_PROMPTS | tomllib.loads(path.read_text(encoding="utf-8")))
    assert recipe.name == path.stem


def test_there_is_a_recipe_for_a_laptop() -> None:
    assert "tiny-cpu.toml" in {path.name for path in RECIPES}
