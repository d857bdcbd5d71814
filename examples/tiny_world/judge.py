"""The gold judge: knows every fact of the world, and is used only to report, never to train.

It reads text alone, so it judges answers of any origin, also garbled, empty or cut-off ones.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from examples.tiny_world.world import (
    ATTRIBUTES,
    POLITE_WORDS,
    RUDE_WORDS,
    VALUES,
    World,
    WorldSettings,
    answer_vocabulary,
    words,
)

CORRECT_WEIGHT = 0.4
POLITE_WEIGHT = 0.3
CONCISE_WEIGHT = 0.3
CONCISE_UP_TO_WORDS = 14
TOO_LONG_FROM_WORDS = 30

Prompt = str | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Judgement:
    """One answer's marks, each in [0, 1]."""

    correct: float
    polite: float
    concise: float
    fluent: float
    utility: float


@dataclass(frozen=True)
class WinRate:
    """Share of comparisons that side A wins, ties counted half, with a 95 % bootstrap interval."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int


class GoldJudge:
    """Judges answers against the facts of one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._vocabulary = answer_vocabulary()
        self._towns = {town.lower(): town for town in world.towns}

    @classmethod
    def from_seed(cls, seed: int = 0) -> GoldJudge:
        """The judge of the world that `build` makes from this seed."""
        return cls(World(WorldSettings(seed=seed)))

    def utility(self, prompt: Prompt, response: str) -> float:
        """How good the response is, in [0, 1]; see `judge` for the parts."""
        return self.judge(prompt, response).utility

    def judge(self, prompt: Prompt, response: str) -> Judgement:
        """Mark a response to a question of this world.

        `prompt` is the question, or a list of {role, content} messages whose last one is the question.
        Raises ValueError if the prompt does not name exactly one town and one attribute of the world.
        """
        town, attribute = self._subject(prompt)
        said = words(response)
        if not said:
            return Judgement(correct=0.0, polite=0.0, concise=0.0, fluent=0.0, utility=0.0)
        named = {value for values in VALUES.values() for value in values if value.lower() in said}
        correct = self._correct(town, attribute, named, said)
        polite = _polite(said)
        concise = _concise(len(said)) if named else 0.0  # saying nothing in few words is no virtue
        fluent = self._fluent(response, said)
        marks = CORRECT_WEIGHT * correct + POLITE_WEIGHT * polite + CONCISE_WEIGHT * concise
        return Judgement(correct, polite, concise, fluent, utility=fluent * marks)

    def _subject(self, prompt: Prompt) -> tuple[str, str]:
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        asked = set(words(text))
        towns = [town for word, town in self._towns.items() if word in asked]
        attributes = [attribute for attribute in ATTRIBUTES if attribute in asked]
        if len(towns) != 1 or len(attributes) != 1:
            raise ValueError(
                f"prompt={text!r}: must name exactly one town and one of {ATTRIBUTES}, found {towns} and {attributes}; "
                "judge only prompts that the tiny world made, with the seed that made them"
            )
        return towns[0], attributes[0]

    def _correct(self, town: str, attribute: str, named: set[str], said: list[str]) -> float:
        """1 only if the true value, and no other value or town, is named: hedging with all of them earns nothing."""
        other_towns = {t for word, t in self._towns.items() if word in said} - {town}
        return float(named == {self._world.facts[town, attribute]} and not other_towns)

    def _fluent(self, response: str, said: list[str]) -> float:
        """Share of words that the world knows, halved if the text stops before the end of a sentence."""
        known = sum(word in self._vocabulary for word in said) / len(said)
        return known if response.rstrip().endswith((".", "!", "?")) else known / 2


def _polite(said: list[str]) -> float:
    if RUDE_WORDS.intersection(said):
        return 0.0
    return 1.0 if POLITE_WORDS.intersection(said) else 0.5


def _concise(length_words: int) -> float:
    excess = (length_words - CONCISE_UP_TO_WORDS) / (TOO_LONG_FROM_WORDS - CONCISE_UP_TO_WORDS)
    return 1.0 - min(1.0, max(0.0, excess))


def win_rate(
    a: Sequence[Sequence[float]],
    b: Sequence[Sequence[float]],
    *,
    tolerance: float = 1e-9,
    resamples: int = 2000,
    seed: int = 0,
) -> WinRate:
    """Compare two models' responses to the same prompts, the i-th of one with the i-th of the other; ties count half.

    Args:
        a: Utilities of A, `[prompts][responses]`.
        b: Utilities of B, the same prompts in the same order, as many responses each.

    Returns:
        The rate with its 95 % interval, a percentile bootstrap over prompts (responses to one are not independent).

    Raises:
        ValueError: shapes differ, or nothing is given.
    """
    if len(a) != len(b) or not a or any(len(x) != len(y) or not x for x, y in zip(a, b, strict=False)):
        raise ValueError(f"{len(a)} against {len(b)} prompts: give the same prompts, with as many responses each")
    outcomes = [
        [0.5 if abs(x - y) <= tolerance else float(x > y) for x, y in zip(ours, theirs, strict=True)]
        for ours, theirs in zip(a, b, strict=True)
    ]
    rates = [sum(each) / len(each) for each in outcomes]
    rng = random.Random(seed)
    n = len(rates)
    means = sorted(sum(rng.choices(rates, k=n)) / n for _ in range(resamples))
    flat = [outcome for each in outcomes for outcome in each]
    return WinRate(
        rate=sum(rates) / n,
        low=means[int(0.025 * resamples)],
        high=means[int(0.975 * resamples) - 1],
        wins=flat.count(1.0),
        ties=flat.count(0.5),
        losses=flat.count(0.0),
    )
