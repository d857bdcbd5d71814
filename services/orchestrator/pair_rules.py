"""From scored responses to preference pairs. Pure; every prompt ends as a pair or as one counted reason.

Dong et al. 2024, section 3: best against worst of n, ties and identical pairs dropped, and for the concise model
r'(x, a) = r(x, a) - weight * |a|. The pair keeps the orientation of r': orienting it again by the raw reward, as the
paper's published code does, makes the longer response win again.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from services.contracts.conversations import Message
from services.contracts.pairs import DropReason, LengthPenalty, Pair, PairRules
from services.contracts.rollouts import Response, Rollout
from services.contracts.scores import ScoreRow

PROMPT_REASONS = (
    DropReason.GENERATION_FAILED,
    DropReason.TOO_FEW_RESPONSES,
    DropReason.IDENTICAL_TOKENS,
    DropReason.TIE,
    DropReason.BELOW_MARGIN,
)
"""Reasons counted once per prompt: prompts = pairs + the sum of these. The others count responses."""


@dataclass(frozen=True)
class PromptOutcome:
    """What became of one prompt: a pair, or the reason for none; and the responses that were dropped on the way."""

    pair: Pair | None
    reason: DropReason | None
    dropped: Counter[DropReason]


@dataclass(frozen=True)
class _Candidate:
    index: int
    response: Response
    reward: float
    value: float
    """The penalised reward, by which the pair is chosen and oriented."""


def pair_of(rollout: Rollout, scores: ScoreRow, rules: PairRules, seed: int) -> PromptOutcome:
    """The pair of one prompt under the rules, or the reason for none.

    Args:
        seed: For the random rules. The choice depends on it, the prompt's id and nothing else.

    Raises:
        ValueError: scores that do not belong to the rollout; never silently aligned.
    """
    if scores.prompt_id != rollout.prompt_id or len(scores.rewards) != len(rollout.responses):
        raise ValueError(
            f"scores of prompt {scores.prompt_id!r} ({len(scores.rewards)}) do not belong to the rollout of "
            f"{rollout.prompt_id!r} ({len(rollout.responses)} responses)"
        )
    dropped: Counter[DropReason] = Counter()
    usable = _usable(rollout, scores, rules, dropped)
    if len(usable) < 2:
        return PromptOutcome(None, DropReason.TOO_FEW_RESPONSES, dropped)
    distinct = _distinct(usable)
    if len(distinct) < 2:
        return PromptOutcome(None, DropReason.IDENTICAL_TOKENS, dropped)
    first, second = _select(distinct, rules, f"{seed}/{rollout.prompt_id}")
    chosen, rejected = (first, second) if first.value >= second.value else (second, first)
    margin = chosen.value - rejected.value
    if margin <= 0.0:
        return PromptOutcome(None, DropReason.TIE, dropped)
    if margin <= rules.min_margin:
        return PromptOutcome(None, DropReason.BELOW_MARGIN, dropped)
    return PromptOutcome(_pair(rollout, scores, chosen, rejected, margin), None, dropped)


def penalised(reward: float, response: Response, penalty: LengthPenalty | None) -> float:
    """r - weight * |a|, in characters (the paper) or tokens."""
    if penalty is None:
        return reward
    return reward - penalty.weight * (len(response.text) if penalty.unit == "characters" else len(response.token_ids))


def _usable(rollout: Rollout, scores: ScoreRow, rules: PairRules, dropped: Counter[DropReason]) -> list[_Candidate]:
    usable: list[_Candidate] = []
    for index, (response, reward) in enumerate(zip(rollout.responses, scores.rewards, strict=True)):
        if not response.text.strip():
            dropped[DropReason.RESPONSE_EMPTY] += 1
        elif rules.drop_truncated and response.finish_reason == "length":
            dropped[DropReason.RESPONSE_TRUNCATED] += 1
        else:
            usable.append(_Candidate(index, response, reward, penalised(reward, response, rules.length_penalty)))
    return usable


def _distinct(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """The first of each set of responses with the same token ids: a response is no alternative to itself."""
    seen: dict[tuple[int, ...], _Candidate] = {}
    for candidate in candidates:
        seen.setdefault(candidate.response.token_ids, candidate)
    return list(seen.values())


def _select(candidates: Sequence[_Candidate], rules: PairRules, seed: str) -> tuple[_Candidate, _Candidate]:
    ranked = sorted(candidates, key=lambda candidate: (-candidate.value, candidate.index))
    best = ranked[0]
    if rules.rule == "best_worst":
        return best, ranked[-1]
    if rules.rule == "best_second":
        return best, ranked[1]
    if rules.rule == "best_random":
        return best, _shuffled(ranked[1:], seed)[0]
    first, second = _shuffled(ranked, seed)[:2]
    return first, second


def _shuffled(candidates: Sequence[_Candidate], seed: str) -> list[_Candidate]:
    """In an order that is random, and the same on every machine and Python: sorted by a hash."""
    return sorted(candidates, key=lambda one: hashlib.sha256(f"{seed}/{one.index}".encode()).digest())


def _pair(rollout: Rollout, scores: ScoreRow, chosen: _Candidate, rejected: _Candidate, margin: float) -> Pair:
    return Pair(
        prompt_id=rollout.prompt_id,
        prompt=rollout.messages,
        chosen=(Message(role="assistant", content=chosen.response.text),),
        rejected=(Message(role="assistant", content=rejected.response.text),),
        prompt_ids=rollout.prompt_token_ids,
        chosen_ids=chosen.response.token_ids,
        rejected_ids=rejected.response.token_ids,
        chosen_reward=chosen.reward,
        rejected_reward=rejected.reward,
        margin=margin,
        chosen_index=chosen.index,
        rejected_index=rejected.index,
        policy_version=rollout.policy_version,
        scorer=scores.scorer,
        scorer_revision=scores.revision,
    )
