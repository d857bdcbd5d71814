"""Proof of a swap by behaviour: do the served log-probs of the manifest's probes agree with the manifest?

Pure functions. Checksums do not prove a swap (a half-swapped engine gave the right ones), and on GPUs stale weights
were seen too (vllm#32718); log-probs cannot be right by accident.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from services.contracts.checkpoints import LogprobProbe

CONCLUSIVE_SIGMAS = 3.0
"""How many standard errors the position between old and new must be known to before it decides anything."""
NEARER = 0.5
"""Position 0 is the old policy, 1 the new one; above this the engine is nearer to the new one."""

Logprobs = tuple[float, ...]


@dataclass(frozen=True)
class Tolerance:
    """Allowed deviation from the manifest, nats."""

    mean: float
    largest: float


@dataclass(frozen=True)
class Proof:
    """What a comparison found.

    Args:
        mean: Mean |served - manifest| over all probe tokens, nats.
        largest: Largest of them, nats.
        position: Where the engine stands between the old policy (0) and the new one (1); None when the two cannot be
            told apart by these probes at this dtype, or there is no old one.
        reason: Why the proof failed; None when it succeeded.
    """

    mean: float
    largest: float
    position: float | None
    reason: str | None

    @property
    def proven(self) -> bool:
        """The engine serves what the manifest promises."""
        return self.reason is None


def usable_probes(probes: Sequence[LogprobProbe], max_model_len: int) -> tuple[LogprobProbe, ...]:
    """Probes that fit the served context with the one token vLLM must generate."""
    return tuple(probe for probe in probes if len(probe.token_ids) < max_model_len)


def judge(
    probes: Sequence[LogprobProbe],
    served: Sequence[Logprobs],
    tolerance: Tolerance,
    old: Sequence[LogprobProbe] = (),
) -> Proof:
    """Compare served log-probs with the new manifest, and with the old one where it has the same sequences.

    Args:
        probes: Of the new manifest.
        served: What the engine gives for them, `[probes][seq - 1]`.
        tolerance: For the engine's dtype.
        old: Probes of the policy served before.
    """
    expected = [value for probe in probes for value in probe.logprobs]
    found = [value for row in served for value in row]
    if len(expected) != len(found) or not expected:
        return Proof(
            math.inf, math.inf, None, f"the engine gave {len(found)} log-probs for {len(expected)} probe tokens"
        )
    if not all(math.isfinite(value) for value in (*expected, *found)):
        return Proof(math.inf, math.inf, None, "a probe's log-prob is not a finite number")
    deviations = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    mean, largest = sum(deviations) / len(deviations), max(deviations)
    position = _position(probes, served, old)
    reason = None
    if mean > tolerance.mean or largest > tolerance.largest:
        reason = (
            f"served log-probs are off by {mean:.4g} nats in the mean and {largest:.4g} at most; allowed are "
            f"{tolerance.mean:g} and {tolerance.largest:g}"
        )
    elif position is not None and position < NEARER:
        reason = (
            f"served log-probs are nearer to the old policy than to the new one (position {position:.2f} of 0 to 1)"
        )
    return Proof(mean, largest, position, reason)


def _position(probes: Sequence[LogprobProbe], served: Sequence[Logprobs], old: Sequence[LogprobProbe]) -> float | None:
    """Projection of the served log-probs on the line from old to new, when rounding noise allows to tell.

    With d = new - old and r = served - old, the position is <r, d> / <d, d>. Its standard error is the noise of one
    log-prob over |d|; the noise is what remains of the nearer of the two.
    """
    old_by_tokens = {probe.token_ids: probe.logprobs for probe in old}
    steps: list[float] = []
    moved: list[float] = []
    for probe, row in zip(probes, served, strict=True):
        before = old_by_tokens.get(probe.token_ids)
        if before is None:
            continue
        steps += [new - was for new, was in zip(probe.logprobs, before, strict=True)]
        moved += [now - was for now, was in zip(row, before, strict=True)]
    length = sum(step * step for step in steps)
    if length == 0.0:
        return None
    to_old = sum(move * move for move in moved)
    to_new = sum((move - step) ** 2 for move, step in zip(moved, steps, strict=True))
    noise = math.sqrt(min(to_old, to_new) / len(steps))
    if CONCLUSIVE_SIGMAS * noise / math.sqrt(length) > NEARER:
        return None
    return sum(move * step for move, step in zip(moved, steps, strict=True)) / length
