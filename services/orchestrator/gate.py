"""The gate: is the candidate better than the incumbent on the same held-out prompts? Pure.

A one-sided paired t-test on the per-prompt mean rewards, and whatever else the recipe requires.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from services.contracts.recipes import GateRecipe
from services.contracts.runs import PairedTest

FRACTION_STEPS = 300
FRACTION_PRECISION = 1e-14


@dataclass(frozen=True)
class Verdict:
    """The gate's decision and a sentence per rule."""

    decision: Literal["promoted", "rejected"]
    reasons: tuple[str, ...]


def paired_test(candidate: Sequence[float], incumbent: Sequence[float]) -> PairedTest:
    """One-sided paired t-test (Student 1908): the mean of candidate - incumbent over the same prompts against 0.

    Args:
        candidate: Mean reward per prompt, `[prompts]`.
        incumbent: The same prompts in the same order.

    Raises:
        ValueError: fewer than two prompts, or not the same number.
    """
    differences = [a - b for a, b in zip(candidate, incumbent, strict=True)]
    n = len(differences)
    if n < 2:
        raise ValueError(f"a paired test needs at least 2 prompts, not {n}")
    mean = math.fsum(differences) / n
    variance = math.fsum((d - mean) ** 2 for d in differences) / (n - 1)
    error = math.sqrt(variance / n)
    if error == 0.0:
        p_value = 0.0 if mean > 0.0 else 1.0
    else:
        p_value = student_upper_tail(mean / error, n - 1)
    return PairedTest(mean_difference=mean, standard_error=error, p_value=p_value, n=n)


def judge(
    test: PairedTest, gate: GateRecipe, *, kl: float | None, candidate_tokens: float, incumbent_tokens: float
) -> Verdict:
    """Apply every rule of the gate; all must hold.

    Args:
        kl: Estimate of KL(candidate || reference), nats per response; None when not measured.
        candidate_tokens: Mean length of the candidate's held-out responses, tokens.
        incumbent_tokens: The incumbent's.
    """
    rules: list[tuple[bool, str]] = []
    better = test.p_value < gate.alpha
    rules.append((
        better,
        f"mean reward difference {test.mean_difference:+.4f} (standard error {test.standard_error:.4f}, "
        f"{test.n} prompts): one-sided p = {test.p_value:.4g} is {'below' if better else 'not below'} {gate.alpha:g}",
    ))  # fmt: skip
    enough = test.mean_difference > gate.min_improvement
    rules.append((
        enough,
        f"improvement {test.mean_difference:+.4f} is {'above' if enough else 'not above'} the required "
        f"{gate.min_improvement:g}",
    ))  # fmt: skip
    if gate.max_kl is not None:
        near = kl is not None and kl <= gate.max_kl
        shown = (
            "was not measured, and the gate allows" if kl is None else f"{kl:.3f} is {'within' if near else 'above'}"
        )
        rules.append((near, f"KL to the reference {shown} {gate.max_kl:g} nats per response"))
    if gate.max_length_ratio is not None:
        ratio = candidate_tokens / incumbent_tokens if incumbent_tokens > 0 else math.inf
        short = ratio <= gate.max_length_ratio
        rules.append((
            short,
            f"responses are {ratio:.2f} times as long as the incumbent's, "
            f"{'within' if short else 'above'} {gate.max_length_ratio:g}",
        ))  # fmt: skip
    promoted = all(holds for holds, _ in rules)
    reasons = tuple(f"{'passed' if holds else 'failed'}: {sentence}" for holds, sentence in rules)
    return Verdict("promoted" if promoted else "rejected", reasons)


def student_upper_tail(t: float, degrees: int) -> float:
    """P(T > t) of Student's t, by the regularised incomplete beta function (Abramowitz & Stegun 26.5.27)."""
    x = degrees / (degrees + t * t)
    tail = 0.5 * _incomplete_beta(degrees / 2.0, 0.5, x)
    return tail if t > 0 else 1.0 - tail


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), by its continued fraction (Abramowitz & Stegun 26.5.8) where that converges fast."""
    if x <= 0.0:
        return 0.0
    if x >= 1.0:
        return 1.0
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    if x < (a + 1.0) / (a + b + 2.0):
        return front * _beta_fraction(a, b, x) / a
    return 1.0 - front * _beta_fraction(b, a, 1.0 - x) / b


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Lentz's method for the continued fraction of the incomplete beta function."""
    tiny = 1e-300
    c, d = 1.0, 1.0 / _nonzero(1.0 - (a + b) * x / (a + 1.0), tiny)
    value = d
    for m in range(1, FRACTION_STEPS):
        even = m * (b - m) * x / ((a + 2 * m - 1.0) * (a + 2 * m))
        d = 1.0 / _nonzero(1.0 + even * d, tiny)
        c = _nonzero(1.0 + even / c, tiny)
        value *= d * c
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1.0))
        d = 1.0 / _nonzero(1.0 + odd * d, tiny)
        c = _nonzero(1.0 + odd / c, tiny)
        step = d * c
        value *= step
        if abs(step - 1.0) < FRACTION_PRECISION:
            return value
    return value


def _nonzero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny
