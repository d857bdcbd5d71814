"""The gate, and what is measured for it."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from services.contracts.conversations import Message
from services.contracts.recipes import GateRecipe
from services.contracts.rollouts import Response, Rollout
from services.contracts.runs import PairedTest
from services.contracts.scores import ScoreRow
from services.orchestrator.gate import Verdict, judge, paired_test, student_upper_tail
from services.orchestrator.measures import Evaluation, SamplingTally, deviation, pearson, win_rate


@given(t=st.floats(-40, 40), degrees=st.integers(1, 2000))
def test_the_t_distribution_agrees_with_scipy(t: float, degrees: int) -> None:
    assert student_upper_tail(t, degrees) == pytest.approx(stats.t.sf(t, degrees), rel=1e-6, abs=1e-12)


def test_the_paired_test_agrees_with_scipy() -> None:
    choice = random.Random(3)
    incumbent = [choice.gauss(0, 1) for _ in range(40)]
    candidate = [value + choice.gauss(0.1, 0.5) for value in incumbent]
    ours = paired_test(candidate, incumbent)
    theirs = stats.ttest_rel(candidate, incumbent, alternative="greater")
    assert ours.p_value == pytest.approx(theirs.pvalue)
    assert ours.n == 40
    assert ours.mean_difference / ours.standard_error == pytest.approx(theirs.statistic)


@pytest.mark.parametrize(("shift", "p_value"), [(0.5, 0.0), (0.0, 1.0), (-0.5, 1.0)])
def test_differences_without_spread_are_decided_by_their_sign(shift: float, p_value: float) -> None:
    assert paired_test([1.0 + shift, 2.0 + shift], [1.0, 2.0]).p_value == p_value


def test_a_paired_test_needs_the_same_prompts() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        paired_test([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="at least 2"):
        paired_test([1.0], [1.0])


BETTER = PairedTest(mean_difference=0.2, standard_error=0.05, p_value=0.001, n=50)


def judged(gate: GateRecipe, test: PairedTest = BETTER, *, kl: float | None = 3.0, tokens: float = 110.0) -> Verdict:
    return judge(test, gate, kl=kl, candidate_tokens=tokens, incumbent_tokens=100.0)


@pytest.mark.parametrize(
    ("gate", "expected", "failed"),
    [
        (GateRecipe(), "promoted", ""),
        (GateRecipe(alpha=0.0005), "rejected", "p = 0.001 is not below 0.0005"),
        (GateRecipe(min_improvement=0.2), "rejected", "+0.2000 is not above the required 0.2"),
        (GateRecipe(max_kl=2.9), "rejected", "3.000 is above 2.9 nats"),
        (GateRecipe(max_kl=3.0), "promoted", ""),
        (GateRecipe(max_length_ratio=1.05), "rejected", "1.10 times as long"),
        (GateRecipe(max_length_ratio=1.2), "promoted", ""),
    ],
)
def test_every_rule_can_reject_and_says_why(gate: GateRecipe, expected: str, failed: str) -> None:
    verdict = judged(gate)
    assert verdict.decision == expected
    reasons = [reason for reason in verdict.reasons if reason.startswith("failed: ")]
    assert len(reasons) == (1 if failed else 0)
    assert all(failed in reason for reason in reasons)


def test_a_kl_that_was_not_measured_does_not_pass_a_kl_rule() -> None:
    assert judged(GateRecipe(max_kl=5.0), kl=None).decision == "rejected"


def rollout(prompt: str, lengths: list[int], logprob: float = -1.0) -> Rollout:
    return Rollout(
        prompt_id=prompt, messages=(Message(role="user", content="q"),), prompt_token_ids=(1,), policy_version="v",
        responses=tuple(
            Response(
                text="x" * length, token_ids=tuple(range(length)), logprob=logprob, seed=0, index=index,
                finish_reason="length" if length > 3 else "stop", temperature=1.0, top_p=1.0,
            )
            for index, length in enumerate(lengths)
        ),
    )  # fmt: skip


def scored(prompt: str, rewards: list[float], reference: list[float] | None = None) -> ScoreRow:
    return ScoreRow(
        prompt_id=prompt, rewards=tuple(rewards), scorer="d", revision="r", template_hash="t",
        reference_logprobs=tuple(reference) if reference else None,
    )  # fmt: skip


def test_sampling_measures_by_hand() -> None:
    tally = SamplingTally()
    tally.add(rollout("a", [1, 2, 3]), scored("a", [1.0, 2.0, 3.0]))
    tally.add(rollout("b", [4, 4, 2]), scored("b", [0.0, 0.0, 1.0]))
    found = tally.measures()
    assert (found.prompts, found.responses, found.tokens) == (2, 6, 16)
    assert found.reward_mean == pytest.approx(7 / 6)
    assert found.reward_best == pytest.approx(2.0)
    assert found.reward_spread == pytest.approx(1.5)
    assert found.reward_length_correlation == pytest.approx(0.0), "+1 and -1"
    assert found.duplicate_fraction == pytest.approx(1 / 6)
    assert found.truncated_fraction == pytest.approx(2 / 6)
    assert found.response_tokens == pytest.approx(16 / 6)


def test_nothing_sampled_has_no_means() -> None:
    found = SamplingTally().measures()
    assert found.reward_mean is None
    assert found.response_tokens is None


def test_kl_is_the_mean_log_ratio_of_the_policy_s_own_responses() -> None:
    evaluation = Evaluation()
    evaluation.add(rollout("a", [1, 2], logprob=-1.0), scored("a", [1.0, 3.0], [-2.0, -4.0]))
    assert evaluation.kl == pytest.approx(2.0)
    assert evaluation.rewards == {"a": 2.0}
    assert Evaluation().kl is None


def test_win_rate_counts_ties_half_and_shared_prompts_only() -> None:
    assert win_rate({"a": 1, "b": 2, "c": 0, "x": 9}, {"a": 0, "b": 2, "c": 1, "y": 9}) == pytest.approx(0.5)
    assert win_rate({"a": 1}, {"b": 1}) is None


def test_pearson_and_deviation() -> None:
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert pearson([1, 1, 1], [1, 2, 3]) is None
    assert deviation([1.0, 3.0]) == pytest.approx(math.sqrt(2))
    assert deviation([1.0]) is None
