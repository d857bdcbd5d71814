"""Pair rules: who is chosen, who is rejected, and what is dropped under which reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts.conversations import Message
from services.contracts.pairs import DropReason, PairRules
from services.contracts.rollouts import Response, Rollout
from services.contracts.scores import ScoreRow
from services.orchestrator.pair_rules import PROMPT_REASONS, PromptOutcome, pair_of


def rollout(texts: Sequence[str], *, prompt: str = "p", truncated: Sequence[int] = ()) -> Rollout:
    return Rollout(
        prompt_id=prompt, messages=(Message(role="user", content="q"),), prompt_token_ids=(9,),
        policy_version="r/iter-1",
        responses=tuple(
            Response(
                text=text, token_ids=(*text.encode(), 0), logprob=-1.0,
                finish_reason="length" if index in truncated else "stop", temperature=1.0, top_p=1.0, seed=1,
                index=index,
            )
            for index, text in enumerate(texts)
        ),
    )  # fmt: skip


def scores(rewards: Sequence[float], prompt: str = "p") -> ScoreRow:
    return ScoreRow(prompt_id=prompt, rewards=tuple(rewards), scorer="default", revision="models/r", template_hash="t")


def outcome(
    texts: Sequence[str], rewards: Sequence[float], *, seed: int = 0, prompt: str = "p",
    truncated: Sequence[int] = (), **rules: Any,
) -> PromptOutcome:  # fmt: skip
    made = rollout(texts, prompt=prompt, truncated=truncated)
    return pair_of(made, scores(rewards, prompt), PairRules.model_validate(rules), seed)


def indices(made: PromptOutcome) -> tuple[int, int]:
    assert made.pair is not None
    return made.pair.chosen_index, made.pair.rejected_index


TEXTS = ("aa", "bb", "cc", "dd")


def test_best_worst_takes_the_extremes() -> None:
    made = outcome(TEXTS, (0.1, 3.0, -2.0, 1.0))
    assert indices(made) == (1, 2)
    assert made.pair is not None
    assert (made.pair.chosen_reward, made.pair.rejected_reward, made.pair.margin) == (3.0, -2.0, 5.0)
    assert (made.pair.chosen[0].content, made.pair.rejected_ids) == ("bb", (*b"cc", 0))


def test_best_second_takes_the_two_best() -> None:
    assert indices(outcome(TEXTS, (0.1, 3.0, -2.0, 1.0), rule="best_second")) == (1, 3)


def test_best_random_takes_the_best_and_every_other_with_some_seed() -> None:
    seen = {indices(outcome(TEXTS, (0.1, 3.0, -2.0, 1.0), rule="best_random", seed=seed)) for seed in range(60)}
    assert seen == {(1, 0), (1, 2), (1, 3)}


def test_random_takes_any_two_and_orients_them_by_reward() -> None:
    rewards = (0.1, 3.0, -2.0, 1.0)
    seen = {indices(outcome(TEXTS, rewards, rule="random", seed=seed)) for seed in range(200)}
    assert seen == {(a, b) for a in range(4) for b in range(4) if rewards[a] > rewards[b]}


def test_random_is_spread_evenly_over_prompts_not_a_fixed_index() -> None:
    picks = [indices(outcome(TEXTS, (1, 2, 3, 4), rule="random", prompt=f"p{number}")) for number in range(600)]
    for pair in {(b, a) for b in range(4) for a in range(b)}:
        assert 60 < picks.count(pair) < 145, "each of the six pairs about 100 times"


def test_random_depends_on_seed_and_prompt_only() -> None:
    first, again = (outcome(TEXTS, (1, 2, 3, 4), rule="random", seed=5) for _ in range(2))
    assert first == again


def test_the_length_penalty_is_kept_through_orientation() -> None:
    """The paper's published code selects by r' and orients by r: the longer response wins again. Not here."""
    long, short = "x" * 1000, "y" * 10
    made = outcome((long, short), (1.5, 1.0), length_penalty={"weight": 0.001})
    assert indices(made) == (1, 0)
    assert made.pair is not None
    assert made.pair.chosen_reward < made.pair.rejected_reward, "raw rewards are recorded as they are"
    assert made.pair.margin == pytest.approx((1.0 - 0.01) - (1.5 - 1.0))


def test_the_length_penalty_counts_tokens_when_asked() -> None:
    made = outcome(("abcd", "é"), (1.0, 0.95), length_penalty={"weight": 0.1, "unit": "tokens"})
    assert indices(made) == (1, 0)
    assert made.pair is not None
    assert made.pair.margin == pytest.approx((0.95 - 0.1 * 3) - (1.0 - 0.1 * 5))


@pytest.mark.parametrize(
    ("texts", "rewards", "options", "reason", "responses"),
    [
        (("a", "b"), (1.0, 1.0), {}, DropReason.TIE, {}),
        (("a", "b"), (1.0, 0.5), {"min_margin": 0.5}, DropReason.BELOW_MARGIN, {}),
        (("a", "a", "a"), (1.0, 1.0, 1.0), {}, DropReason.IDENTICAL_TOKENS, {}),
        (("a", ""), (1.0, 0.0), {}, DropReason.TOO_FEW_RESPONSES, {DropReason.RESPONSE_EMPTY: 1}),
        (("a", " \n"), (1.0, 0.0), {}, DropReason.TOO_FEW_RESPONSES, {DropReason.RESPONSE_EMPTY: 1}),
        (
            ("a", "b"), (1.0, 0.0), {"truncated": (0, 1)}, DropReason.TOO_FEW_RESPONSES,
            {DropReason.RESPONSE_TRUNCATED: 2},
        ),
    ],
)  # fmt: skip
def test_what_makes_no_pair_is_counted(
    texts: tuple[str, ...], rewards: tuple[float, ...], options: dict[str, Any], reason: DropReason,
    responses: dict[Any, int],
) -> None:  # fmt: skip
    made = outcome(texts, rewards, **options)
    assert made.pair is None
    assert made.reason is reason
    assert made.dropped == responses


def test_truncated_responses_are_left_out_of_a_pair_and_kept_on_request() -> None:
    made = outcome(TEXTS, (0.1, 3.0, -2.0, 1.0), truncated=(1,))
    assert indices(made) == (3, 2)
    assert made.dropped == {DropReason.RESPONSE_TRUNCATED: 1}
    assert indices(outcome(TEXTS, (0.1, 3.0, -2.0, 1.0), truncated=(1,), drop_truncated=False)) == (1, 2)


def test_a_copy_of_the_best_is_not_its_second() -> None:
    assert indices(outcome(("a", "a", "b"), (2.0, 2.0, 1.0), rule="best_second")) == (0, 2)


def test_scores_of_another_prompt_are_refused() -> None:
    with pytest.raises(ValueError, match="do not belong"):
        pair_of(rollout(("a", "b")), scores((1.0, 2.0), "other"), PairRules(), 0)
    with pytest.raises(ValueError, match="do not belong"):
        pair_of(rollout(("a", "b")), scores((1.0,)), PairRules(), 0)


@given(
    answers=st.lists(st.tuples(st.sampled_from(["", "a", "b", "cc", "ddd"]), st.floats(-5, 5)), min_size=1, max_size=8),
    rule=st.sampled_from(["best_worst", "best_second", "best_random", "random"]),
    weight=st.sampled_from([None, 0.0, 0.5]),
    seed=st.integers(0, 99),
)
def test_every_prompt_is_a_pair_or_one_counted_reason(
    answers: list[tuple[str, float]], rule: str, weight: float | None, seed: int
) -> None:
    penalty = None if weight is None else {"weight": weight}
    texts, rewards = [text for text, _ in answers], [reward for _, reward in answers]
    made = outcome(texts, rewards, rule=rule, length_penalty=penalty, seed=seed)
    assert (made.pair is None) != (made.reason is None)
    if made.pair is None:
        assert made.reason in PROMPT_REASONS
        return
    chosen, rejected = made.pair.chosen_index, made.pair.rejected_index
    values = [reward - (weight or 0.0) * len(text) for text, reward in answers]
    assert made.pair.margin == pytest.approx(values[chosen] - values[rejected])
    assert made.pair.margin > 0
    assert texts[chosen] != texts[rejected]
