"""The tiny world: made-up towns, two facts about each, questions in many wordings, answers of mixed quality.

Pure and seeded: the same seed gives the same towns, facts and texts. Nothing here needs torch.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Literal

Tone = Literal["polite", "neutral", "rude"]

# fmt: off
_TOWNS = (
    "Bramwick", "Corvale", "Dunmere", "Elsford", "Fenholt", "Galdane", "Harwick", "Jarrow",
    "Kelby", "Lorwen", "Mossgate", "Norbury", "Quenby", "Silverton", "Thornby", "Velmora",
)
# fmt: on

VALUES: dict[str, tuple[str, ...]] = {
    "river": ("Tarn", "Ousel", "Brenna", "Lisk", "Morrow"),
    "emblem": ("heron", "badger", "otter", "falcon", "stag"),
}
"""The possible values of each attribute. An attribute's name appears in every question about it."""

ATTRIBUTES = tuple(VALUES)

_LEADS = (
    "",
    "Hello. ",
    "Quick question: ",
    "I am curious. ",
    "One more thing. ",
    "Good morning. ",
    "Excuse me. ",
    "Just wondering: ",
    "For my notes: ",
    "A friend asks: ",
)
_TRAIN_WORDINGS = (
    "What is the {a} of {t}?",
    "Tell me the {a} of {t}.",
    "Which {a} does {t} have?",
    "For {t}, what is the {a}?",
    "Name the {a} of {t}.",
    "Do you know the {a} of {t}?",
)
_HELD_OUT_WORDINGS = (
    "The {a} of {t} is what?",
    "What {a} does {t} have?",
    "Do you know which {a} is the {a} of {t}?",
    "{t}: what is the {a}?",
    "Tell me what the {a} of {t} is.",
)

_OPENERS: dict[Tone, tuple[str, ...]] = {
    "polite": ("Happy to help!", "Thank you for asking.", "Gladly!", "With pleasure."),
    "neutral": ("", "", "Right.", "Well."),
    "rude": ("Ugh, not again.", "What a silly question.", "You should know this already.", "Stop wasting my time."),
}
_CLOSERS: dict[Tone, tuple[str, ...]] = {
    "polite": ("", "Have a lovely day!", "Do ask me more."),
    "neutral": ("",),
    "rude": ("", "Now leave me alone.", "Look it up yourself next time."),
}
_CORES = ("The {a} of {t} is the {v}.", "It is the {v}.", "{t} has the {v}.")
_EVASION = "Who knows?"
_PADDING = (
    "As many people have noted over the years, this has a long and winding history.",
    "Before we come to the point, every town in this land is rather different.",
    "There is so much to say about this, and so little room to say it.",
    "Generally speaking, and all things considered, it depends on a great many things.",
)

POLITE_WORDS = frozenset({"happy", "thank", "gladly", "pleasure", "lovely", "ask"})
RUDE_WORDS = frozenset({"ugh", "silly", "already", "stop", "wasting", "alone", "yourself"})


@dataclass(frozen=True)
class WorldSettings:
    """What a world is made of; probabilities describe the mixture that the SFT model imitates."""

    seed: int = 0
    held_out_towns: int = 4
    tones: tuple[tuple[Tone, float], ...] = (("polite", 0.25), ("neutral", 0.3), ("rude", 0.45))
    right_given_tone: tuple[tuple[Tone, float], ...] = (("polite", 0.65), ("neutral", 0.6), ("rude", 0.55))
    padded: float = 0.6
    evasive: float = 0.08


@dataclass(frozen=True)
class Question:
    """One question, with what it is about."""

    town: str
    attribute: str
    text: str


@dataclass(frozen=True)
class Answer:
    """One answer in parts, so that a copy can differ in exactly one respect."""

    tone: Tone
    opener: str
    padding: str
    core: str
    value: str
    closer: str

    def text(self, question: Question) -> str:
        """The answer as one string of sentences."""
        core = self.core.format(a=question.attribute, t=question.town, v=self.value)
        return " ".join(part for part in (self.opener, self.padding, core, self.closer) if part) or _EVASION


class World:
    """Towns, facts, questions and answers of one seed."""

    def __init__(self, settings: WorldSettings | None = None) -> None:
        self.settings = settings or WorldSettings()
        if not 0 < self.settings.held_out_towns < len(_TOWNS):
            raise ValueError(
                f"held_out_towns={self.settings.held_out_towns}: must be between 1 and {len(_TOWNS) - 1}, "
                "so that both the loop and the evaluation have towns"
            )
        rng = self.rng("world")
        towns = list(_TOWNS)
        rng.shuffle(towns)
        self.towns = tuple(towns)
        self.held_out_towns = self.towns[: self.settings.held_out_towns]
        self.loop_towns = self.towns[self.settings.held_out_towns :]
        self.facts: dict[tuple[str, str], str] = {}
        for attribute, values in VALUES.items():
            # Each value is true of equally many towns: no value is a good guess for all of them.
            column = [values[i % len(values)] for i in range(len(towns))]
            rng.shuffle(column)
            self.facts.update({(town, attribute): value for town, value in zip(self.towns, column, strict=True)})

    def rng(self, purpose: str) -> random.Random:
        """A generator for one purpose, so that drawing more for one leaves the others unchanged."""
        return random.Random(f"tiny-world:{self.settings.seed}:{purpose}")

    def training_questions(self) -> list[Question]:
        """Every question in the training wordings, about all towns, in a fixed order."""
        return self._questions(self.towns, _TRAIN_WORDINGS)

    def loop_questions(self) -> list[Question]:
        """The training wordings about the towns that the loop may ask about."""
        return self._questions(self.loop_towns, _TRAIN_WORDINGS)

    def held_out_questions(self) -> list[Question]:
        """Unseen wordings about the towns that the loop never asks about."""
        return self._questions(self.held_out_towns, _HELD_OUT_WORDINGS)

    def _questions(self, towns: tuple[str, ...], wordings: tuple[str, ...]) -> list[Question]:
        return [
            Question(town, attribute, lead + wording.format(a=attribute, t=town))
            for town in towns
            for attribute in ATTRIBUTES
            for wording in wordings
            for lead in _LEADS
        ]

    def draw_answer(self, question: Question, rng: random.Random) -> Answer:
        """One answer from the mixture: some right, some wrong, some none, in any tone, plain or padded."""
        tones, weights = zip(*self.settings.tones, strict=True)
        tone: Tone = rng.choices(tones, weights)[0]
        right = rng.random() < dict(self.settings.right_given_tone)[tone]
        answer = Answer(
            tone=tone,
            opener=rng.choice(_OPENERS[tone]),
            padding=rng.choice(_PADDING) if rng.random() < self.settings.padded else "",
            core=rng.choice(_CORES),
            value=self.facts[question.town, question.attribute] if right else self._wrong_value(question, rng),
            closer=rng.choice(_CLOSERS[tone]),
        )
        return evasion(answer) if rng.random() < self.settings.evasive else answer

    def draw_contrast(self, question: Question, answer: Answer, rng: random.Random) -> Answer:
        """A copy of `answer` that names another value: the right one if it was wrong, and the reverse."""
        truth = self.facts[question.town, question.attribute]
        value = self._wrong_value(question, rng) if answer.value == truth else truth
        return replace(answer, value=value)

    def _wrong_value(self, question: Question, rng: random.Random) -> str:
        truth = self.facts[question.town, question.attribute]
        return rng.choice([value for value in VALUES[question.attribute] if value != truth])


def evasion(answer: Answer) -> Answer:
    """A copy of `answer` that does not answer."""
    return replace(answer, core="", value="")


def answer_vocabulary() -> frozenset[str]:
    """Every lower-case word that a well-formed answer can contain."""
    texts = [*_PADDING, *_CORES, _EVASION, *_TOWNS, *ATTRIBUTES]
    for group in (*_OPENERS.values(), *_CLOSERS.values(), *VALUES.values()):
        texts.extend(group)
    return frozenset(word for text in texts for word in words(text))


def words(text: str) -> list[str]:
    """Lower-case words of `text`, without punctuation."""
    cleaned = "".join(c if c.isalnum() else " " for c in text.lower())
    return cleaned.split()
