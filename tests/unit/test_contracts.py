"""What the contracts refuse, and how they say it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import ValidationError

from services.contracts.checkpoints import LogprobProbe
from services.contracts.conversations import Message, Prompt, prompt_id
from services.contracts.layout import checkpoint_folder, version_of
from services.contracts.pairs import Pair
from services.contracts.recipes import Recipe
from services.contracts.rollouts import RolloutRequest, Sampling, SamplingGroup
from services.contracts.scores import ScoreRow

USER = Message(role="user", content="q")


def recipe(**changes: object) -> dict[str, object]:
    base: dict[str, object] = {
        "policy": "models/sft",
        "reward_model": "models/rm",
        "prompts": {"path": "datasets/p.jsonl"},
        "heldout": {"path": "datasets/h.jsonl"},
        "sampling": {"prompts_per_iteration": 8, "max_tokens": 16},
        "dpo": {"learning_rate": 1e-4, "train_batch_size": 8, "max_length": 64},
    }
    return base | changes


def test_the_default_recipe_samples_as_the_paper_does() -> None:
    sampling = Recipe.model_validate(recipe()).sampling
    assert [(g.n, g.temperature) for g in sampling.groups] == [(4, 1.0), (4, 0.7)]


def test_an_unknown_key_is_refused_at_every_depth() -> None:
    with pytest.raises(ValidationError, match="learning_rte"):
        Recipe.model_validate(recipe(dpo={"learning_rte": 1e-4, "train_batch_size": 8, "max_length": 64}))
    with pytest.raises(ValidationError, match="bta"):
        Recipe.model_validate(recipe(bta=0.1))


def test_one_response_per_prompt_cannot_make_a_pair() -> None:
    sampling = {"prompts_per_iteration": 8, "max_tokens": 16, "groups": [{"n": 1, "temperature": 1.0}]}
    with pytest.raises(ValidationError, match="needs n >= 2"):
        Recipe.model_validate(recipe(sampling=sampling))


def test_responses_that_cannot_fit_training_are_refused() -> None:
    sampling = {"prompts_per_iteration": 8, "max_tokens": 64}
    with pytest.raises(ValidationError, match=r"dpo\.max_length"):
        Recipe.model_validate(recipe(sampling=sampling))


def test_micro_batches_that_do_not_fill_the_batch_are_refused() -> None:
    dpo = {"learning_rate": 1e-4, "train_batch_size": 8, "micro_batch_size": 3, "max_length": 64}
    with pytest.raises(ValidationError, match="3 does not divide train_batch_size 8"):
        Recipe.model_validate(recipe(dpo=dpo))


def test_sampling_all_at_temperature_zero_is_refused() -> None:
    sampling = {"prompts_per_iteration": 8, "max_tokens": 16, "groups": [{"n": 4, "temperature": 0.0}]}
    with pytest.raises(ValidationError, match="temperature 0"):
        Recipe.model_validate(recipe(sampling=sampling))


def test_a_prompt_ends_with_the_user_and_is_not_empty() -> None:
    with pytest.raises(ValidationError, match="must be the user's"):
        Prompt.of((USER, Message(role="assistant", content="a")))
    with pytest.raises(ValidationError, match="is empty"):
        Prompt.of((Message(role="user", content="  \n"),))


def test_the_same_messages_have_the_same_id_everywhere() -> None:
    assert prompt_id((USER,)) == prompt_id((Message(role="user", content="q"),)) == "7be60628a3ca0c78"
    assert prompt_id((USER,)) != prompt_id((Message(role="system", content="q"),))


def test_prompt_ids_are_unique_in_a_request() -> None:
    prompt = Prompt.of((USER,))
    sampling = Sampling(groups=(SamplingGroup(n=2, temperature=1.0),), max_tokens=4)
    with pytest.raises(ValidationError, match="occurs twice"):
        RolloutRequest(policy_version="v", prompts=(prompt, prompt), sampling=sampling, seed=0)


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_no_number_is_never_stored(reward: float) -> None:
    with pytest.raises(ValidationError, match="never defaulted"):
        ScoreRow(prompt_id="p", rewards=(0.1, reward), scorer="s", revision="r", template_hash="h")


def test_a_pair_of_equal_responses_cannot_exist() -> None:
    with pytest.raises(ValidationError, match="same token ids"):
        Pair(
            prompt_id="p", prompt=(USER,), chosen=(), rejected=(),
            prompt_ids=(1,), chosen_ids=(2, 3), rejected_ids=(2, 3),
            chosen_reward=1.0, rejected_reward=0.0, margin=1.0, chosen_index=0, rejected_index=1,
            policy_version="v", scorer="s", scorer_revision="r",
        )  # fmt: skip


def test_a_probe_has_a_log_prob_for_each_token_after_the_first() -> None:
    with pytest.raises(ValidationError, match="3 tokens need 2 log-probs, not 3"):
        LogprobProbe(token_ids=(1, 2, 3), logprobs=(0.0, 0.0, 0.0))


def test_a_version_is_derived_from_the_checkpoint_s_path() -> None:
    assert version_of(checkpoint_folder("run-a", 2)) == "run-a/iter-2"
    assert version_of("models/sft") == "models/sft"


def test_half_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(ValidationError, match="half a surrogate pair at character 2"):
        Message(role="user", content="ab\ud800")


@pytest.mark.parametrize(
    "evaluation",
    [{"max_tokens": 0}, {"max_tokens": -1}, {"n": 1025}, {"temperature": 11}, {"temperature": float("nan")}],
)
def test_an_evaluation_that_no_generator_takes_is_refused_with_the_recipe(evaluation: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="evaluation"):
        Recipe.model_validate(recipe(evaluation=evaluation))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "changes",
    [
        lambda number: {"gate": {"min_improvement": number}},
        lambda number: {"gate": {"max_kl": number}},
        lambda number: {"pairs": {"min_margin": number}},
        lambda number: {"pairs": {"length_penalty": {"weight": number}}},
        lambda number: {"dpo": {"learning_rate": 1e-4, "train_batch_size": 8, "max_length": 64, "beta": number}},
    ],
)
def test_a_number_that_is_none_is_no_setting(changes: Callable[[float], dict[str, object]], number: float) -> None:
    with pytest.raises(ValidationError):
        Recipe.model_validate(recipe(**changes(number)))
