"""Probes: fixed token sequences with what the saved weights make of them. The proof of a swap rests on these."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from services.contracts.checkpoints import LogprobProbe, ScoreProbe
from services.contracts.errors import JobFailed
from services.trainer.forward import scores, token_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBES = 6
PROBE_TOKENS = 64
CONTEXT_TOKENS = 24
"""Tokens of the prompt's end that a probe shows before the response, when both do not fit."""
CANDIDATES = 24
SCORE_PROBE_TOKENS = 256
MIN_PROBE_TOKENS = 4


def probe_window(prompt: Sequence[int], response: Sequence[int]) -> tuple[int, ...]:
    """The stretch around the response's beginning, at most PROBE_TOKENS: training changes the policy there."""
    room = PROBE_TOKENS - min(len(response), PROBE_TOKENS - CONTEXT_TOKENS)
    context = list(prompt)[-room:]
    return tuple(context + list(response)[: PROBE_TOKENS - len(context)])


def candidate_windows(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[int, ...]]:
    """Distinct windows of the first prompts and responses, long enough to tell versions apart."""
    windows = dict.fromkeys(probe_window(prompt, response) for prompt, response in pairs[: 2 * CANDIDATES])
    found = [window for window in windows if len(window) >= MIN_PROBE_TOKENS]
    return (found or [w for w in windows if len(w) >= 2])[:CANDIDATES]


def most_changed(
    windows: Sequence[tuple[int, ...]], before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]
) -> tuple[list[int], float]:
    """Indices of the PROBES windows whose log-probs training moved most, and the largest move of one token, nats."""
    moves = [max(abs(a - b) for a, b in zip(x, y, strict=True)) for x, y in zip(before, after, strict=True)]
    order = sorted(range(len(windows)), key=lambda i: (-moves[i], i))[:PROBES]
    return sorted(order), max(moves, default=0.0)


def logprob_probes(
    model: PreTrainedModel, windows: Sequence[tuple[int, ...]], before: Sequence[Sequence[float]] | None = None
) -> tuple[tuple[LogprobProbe, ...], float]:
    """Probes of a policy from its saved weights, and how far the most telling one moved from `before`, nats.

    Raises:
        JobFailed: a log-prob is not finite, so the weights are broken.
    """
    after = [token_logprobs(model, window) for window in windows]
    if not all(math.isfinite(value) for row in after for value in row):
        raise JobFailed(
            "the saved weights give log-probs that are not finite; the training diverged. Lower learning_rate, or "
            "check the start checkpoint"
        )
    chosen, shift = most_changed(windows, before, after) if before else (list(range(min(PROBES, len(windows)))), 0.0)
    return tuple(LogprobProbe(token_ids=windows[i], logprobs=tuple(after[i])) for i in chosen), shift


def score_probes(model: PreTrainedModel, rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[ScoreProbe, ...]:
    """Probes of a reward model, one row at a time.

    Raises:
        JobFailed: a score is not finite.
    """
    windows = [tuple(row)[-SCORE_PROBE_TOKENS:] for row in rows[:PROBES]]
    found = scores(model, windows, pad_token_id=pad_token_id, padded=False).tolist()
    if not all(math.isfinite(score) for score in found):
        raise JobFailed("the saved weights give scores that are not finite; the training diverged: lower learning_rate")
    return tuple(ScoreProbe(token_ids=ids, score=score) for ids, score in zip(windows, found, strict=True))
