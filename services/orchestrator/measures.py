"""What is measured of an iteration: sums over chunks, so that no stage has to be held in memory. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from services.contracts.model import Contract
from services.contracts.rollouts import Rollout
from services.contracts.scores import ScoreRow


class SamplingMeasures(Contract):
    """Of the sampled responses of an iteration. Rewards raw; lengths in tokens."""

    prompts: int
    responses: int
    tokens: int
    reward_mean: float | None
    reward_best: float | None
    reward_spread: float | None
    reward_length_correlation: float | None
    duplicate_fraction: float | None
    truncated_fraction: float | None
    response_tokens: float | None


@dataclass
class SamplingTally:
    """Adds up rollouts and their scores, prompt by prompt."""

    prompts: int = 0
    responses: int = 0
    tokens: int = 0
    rewards: float = 0.0
    bests: float = 0.0
    spreads: float = 0.0
    duplicates: int = 0
    truncated: int = 0
    correlations: list[float] = field(default_factory=list[float])

    def add(self, rollout: Rollout, scores: ScoreRow) -> None:
        """Count one prompt with its responses."""
        lengths = [len(response.token_ids) for response in rollout.responses]
        self.prompts += 1
        self.responses += len(rollout.responses)
        self.tokens += sum(lengths)
        self.rewards += math.fsum(scores.rewards)
        self.bests += max(scores.rewards)
        self.spreads += max(scores.rewards) - min(scores.rewards)
        self.duplicates += len(rollout.responses) - len({response.token_ids for response in rollout.responses})
        self.truncated += sum(1 for response in rollout.responses if response.finish_reason == "length")
        correlation = pearson(scores.rewards, lengths)
        if correlation is not None:
            self.correlations.append(correlation)

    def measures(self) -> SamplingMeasures:
        """The means."""
        return SamplingMeasures(
            prompts=self.prompts,
            responses=self.responses,
            tokens=self.tokens,
            reward_mean=_ratio(self.rewards, self.responses),
            reward_best=_ratio(self.bests, self.prompts),
            reward_spread=_ratio(self.spreads, self.prompts),
            reward_length_correlation=_ratio(math.fsum(self.correlations), len(self.correlations)),
            duplicate_fraction=_ratio(self.duplicates, self.responses),
            truncated_fraction=_ratio(self.truncated, self.responses),
            response_tokens=_ratio(self.tokens, self.responses),
        )


@dataclass
class Evaluation:
    """A policy's held-out responses, boiled down to what the gate and the metrics need."""

    rewards: dict[str, float] = field(default_factory=dict[str, float])
    """Mean reward of each prompt's responses, by prompt id."""
    responses: int = 0
    tokens: int = 0
    truncated: int = 0
    kl_sum: float = 0.0
    kl_responses: int = 0

    def add(self, rollout: Rollout, scores: ScoreRow) -> None:
        """Count one held-out prompt."""
        self.rewards[rollout.prompt_id] = math.fsum(scores.rewards) / len(scores.rewards)
        self.responses += len(rollout.responses)
        self.tokens += sum(len(response.token_ids) for response in rollout.responses)
        self.truncated += sum(1 for response in rollout.responses if response.finish_reason == "length")
        if scores.reference_logprobs is not None:
            for response, reference in zip(rollout.responses, scores.reference_logprobs, strict=True):
                self.kl_sum += response.logprob - reference
                self.kl_responses += 1

    @property
    def kl(self) -> float | None:
        """Mean of log pi(a|x) - log pi_ref(a|x) over the policy's own responses: KL(pi || pi_ref), nats per response.

        Unbiased for responses drawn at temperature 1 and top_p 1.
        """
        return _ratio(self.kl_sum, self.kl_responses)

    @property
    def mean_reward(self) -> float | None:
        """Mean over prompts."""
        return mean(list(self.rewards.values()))

    @property
    def mean_tokens(self) -> float | None:
        """Mean response length, tokens."""
        return _ratio(self.tokens, self.responses)

    @property
    def truncated_fraction(self) -> float | None:
        """Part of the responses that ended by length."""
        return _ratio(self.truncated, self.responses)


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None of fewer than two values."""
    if len(values) < 2:
        return None
    centre = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def paired(left: Mapping[str, float], right: Mapping[str, float]) -> tuple[list[float], list[float]]:
    """The values of the prompts that both have, in the same order."""
    shared = [prompt for prompt in left if prompt in right]
    return [left[prompt] for prompt in shared], [right[prompt] for prompt in shared]


def win_rate(left: Mapping[str, float], right: Mapping[str, float]) -> float | None:
    """Part of the shared prompts on which `left` has the higher reward; a tie counts half."""
    a, b = paired(left, right)
    return mean([1.0 if x > y else 0.5 if x == y else 0.0 for x, y in zip(a, b, strict=True)])


def pearson(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Pearson's correlation; None when either side does not vary."""
    n = len(xs)
    if n < 2:
        return None
    x_mean, y_mean = math.fsum(xs) / n, math.fsum(ys) / n
    xx = math.fsum((x - x_mean) ** 2 for x in xs)
    yy = math.fsum((y - y_mean) ** 2 for y in ys)
    if xx <= 0.0 or yy <= 0.0:
        return None
    return math.fsum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / math.sqrt(xx * yy)


def covered_seconds(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of time spans (start, end): overlaps count once, gaps not at all."""
    covered, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def _ratio(total: float, count: int) -> float | None:
    return total / count if count else None
