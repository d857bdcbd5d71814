"""Recipes from files and flags: every mistake is named before anything is uploaded."""

import json
from pathlib import Path

import pytest

from ratchet.cli.recipes import draft, parse_setting, sampling_groups, split_heldout
from services.contracts.errors import InvalidInput

RECIPE = """
policy = "models/sft"
reward_model = "models/rm"
[prompts]
path = "prompts.jsonl"
[heldout]
path = "heldout.jsonl"
[sampling]
prompts_per_iteration = 8
max_tokens = 16
[dpo]
learning_rate = 1e-5
train_batch_size = 4
max_length = 64
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE)
    return file


def test_flags_override_the_file_and_set_overrides_any_key(recipe: Path) -> None:
    made = draft(recipe, {"policy": "models/other", "seed": None}, ["dpo.num_train_epochs=1", "name=mine"])
    assert made.recipe.policy == "models/other"
    assert made.recipe.dpo.num_train_epochs == 1
    assert made.recipe.name == "mine"
    assert not made.split_heldout


def test_paths_of_a_file_are_relative_to_it_and_those_of_flags_to_the_working_folder(recipe: Path) -> None:
    made = draft(recipe, {"prompts.path": "here.jsonl"}, [])
    assert made.local_path("prompts.path", made.recipe.prompts.path) == Path("here.jsonl")
    assert made.local_path("heldout.path", made.recipe.heldout.path) == recipe.parent / "heldout.jsonl"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("dpo.betta=1", "dpo.betta is an unknown key; did you mean beta?"),
        ("dpo.epochs=1", "did you mean num_train_epochs?"),
        ("samplng.n=3", "samplng is an unknown key; did you mean sampling?"),
        ("dpo.beta=-1", "dpo.beta = -1: "),
        ("sampling.groups=[{n=1,temperature=1.0}]", "cannot make a pair"),
        ("policy.name=1", "policy is not a table"),
        ("nonsense", "is not KEY=VALUE"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_remedy(recipe: Path, setting: str, message: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        draft(recipe, {}, [setting])
    assert message in raised.value.detail


def test_a_missing_key_names_its_flag() -> None:
    with pytest.raises(InvalidInput) as raised:
        draft(None, {"policy": "models/sft", "prompts.path": "p.jsonl"}, [])
    assert "reward_model is missing; give --reward-model" in raised.value.detail
    assert "heldout" not in raised.value.detail, "held-out prompts are split off when they are not given"


def test_a_recipe_that_does_not_exist_names_its_neighbour(recipe: Path) -> None:
    with pytest.raises(InvalidInput, match=r"did you mean .*recipe\.toml"):
        draft(recipe.with_name("recipee.toml"), {}, [])


def test_a_syntax_error_tells_its_place(recipe: Path) -> None:
    recipe.write_text("policy = \n")
    with pytest.raises(InvalidInput, match="line 1"):
        draft(recipe, {}, [])


def test_values_of_set_are_toml_else_text() -> None:
    assert parse_setting("a.b=1e-5") == ("a.b", 1e-5)
    assert parse_setting("a=true") == ("a", True)
    assert parse_setting("a=models/x") == ("a", "models/x")


def test_n_is_shared_evenly_by_the_temperatures() -> None:
    assert sampling_groups(None, []) is None
    assert sampling_groups(8, [1.0, 0.7]) == [{"n": 4, "temperature": 1.0}, {"n": 4, "temperature": 0.7}]
    with pytest.raises(InvalidInput, match="multiple of 2"):
        sampling_groups(3, [1.0, 0.7])


def test_the_held_out_part_is_always_the_same_whatever_the_order(tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"question {i}"}) for i in range(100)]
    file, part, other = tmp_path / "p.jsonl", tmp_path / "h.jsonl", tmp_path / "o.jsonl"
    file.write_text("\n".join(rows))
    assert split_heldout(file, part) == 10
    file.write_text("\n".join(reversed(rows)))
    split_heldout(file, other)
    assert set(part.read_text().splitlines()) == set(other.read_text().splitlines()) <= set(rows)


def test_too_few_prompts_cannot_be_split(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n' * 50)
    with pytest.raises(InvalidInput, match="1 different prompts"):
        split_heldout(file, tmp_path / "h.jsonl")
