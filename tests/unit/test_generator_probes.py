"""The proof of a swap, as a pure function."""

import random

from services.contracts.checkpoints import LogprobProbe
from services.generator.probes import Tolerance, judge, usable_probes

TOLERANCE = Tolerance(mean=0.05, largest=0.5)


def probes(values: list[float]) -> tuple[LogprobProbe, ...]:
    return (LogprobProbe(token_ids=tuple(range(len(values) + 1)), logprobs=tuple(values)),)


def noisy(values: list[float], scale: float, seed: int = 0) -> list[tuple[float, ...]]:
    draw = random.Random(seed)
    return [tuple(value + draw.gauss(0, scale) for value in values)]


DRAW = random.Random(1)
NEW = [DRAW.uniform(-6, 0) for _ in range(200)]
FAR = [DRAW.uniform(-6, 0) for _ in range(200)]
NEAR = [value + DRAW.gauss(0, 0.03) for value in NEW]
SAME = [value + DRAW.gauss(0, 0.0001) for value in NEW]


def test_log_probs_within_rounding_of_the_manifest_are_proven() -> None:
    proof = judge(probes(NEW), noisy(NEW, 0.01), TOLERANCE, probes(FAR))
    assert proof.proven
    assert proof.position is not None
    assert abs(proof.position - 1) < 0.05


def test_stale_weights_far_from_the_new_ones_are_caught() -> None:
    proof = judge(probes(NEW), noisy(FAR, 0.01), TOLERANCE, probes(FAR))
    assert not proof.proven
    assert "off by" in (proof.reason or "")


def test_stale_weights_within_the_tolerance_are_caught_because_they_are_nearer_to_the_old_policy() -> None:
    proof = judge(probes(NEW), noisy(NEAR, 0.01), TOLERANCE, probes(NEAR))
    assert not proof.proven
    assert "nearer to the old policy" in (proof.reason or "")


def test_a_right_swap_between_policies_that_rounding_cannot_tell_apart_is_not_refused() -> None:
    for seed in range(50):
        proof = judge(probes(NEW), noisy(NEW, 0.02, seed), TOLERANCE, probes(SAME))
        assert proof.proven
        assert proof.position is None


def test_a_small_step_under_large_rounding_never_refuses_the_right_policy() -> None:
    for seed in range(200):
        assert judge(probes(NEW), noisy(NEW, 0.03, seed), TOLERANCE, probes(NEAR)).proven


def test_one_log_prob_far_off_fails_although_the_mean_is_fine() -> None:
    served = [*NEW[:-1], NEW[-1] - 3]
    assert not judge(probes(NEW), [tuple(served)], TOLERANCE).proven


def test_missing_or_infinite_log_probs_fail() -> None:
    assert not judge(probes(NEW), [tuple(NEW[:-1])], TOLERANCE).proven
    assert not judge(probes(NEW), [(*NEW[:-1], float("nan"))], TOLERANCE).proven
    assert not judge((), [], TOLERANCE).proven


def test_probes_that_do_not_fit_the_context_are_left_out() -> None:
    long, short = probes(NEW)[0], probes(NEW[:5])[0]
    assert usable_probes((long, short), 100) == (short,)
