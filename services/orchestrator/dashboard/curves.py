"""The curves of a run, from its view: what each shows, in which order. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from services.contracts.runs import IterationMetrics, IterationView, RunView, Stage
from services.orchestrator.dashboard.charts import (
    AMBER,
    BLUE,
    GREEN,
    ROSE,
    SLATE,
    STAGE_COLOURS,
    TEAL,
    VIOLET,
    Band,
    Line,
    Values,
    bar_chart,
    line_chart,
)
from services.orchestrator.dashboard.figures import count, duration, number, percent
from services.orchestrator.dashboard.training_curve import TrainingPoint

Shown = Callable[[float | None], str]
Z = 1.96
"""Half the width of a 95 % interval, in standard errors."""
TIMED = tuple(stage for stage in Stage if stage is not Stage.IMPORT)


@dataclass(frozen=True)
class Key:
    """One entry of a curve's key: name, colour, and the latest figure."""

    name: str
    colour: str
    latest: str
    dashed: bool = False


@dataclass(frozen=True)
class Curve:
    """One chart with its title and key."""

    id: str
    title: str
    about: str
    keys: tuple[Key, ...]
    options: dict[str, Any]
    empty: bool


def curves(view: RunView) -> tuple[Curve, ...]:
    """All curves over the decided iterations of a run."""
    return tuple(make(_History(view)) for make in _CURVES)


def training_curve(points: Sequence[TrainingPoint], iteration: int | None) -> Curve:
    """Loss, accuracy and margin by step of one training."""
    steps = [str(point.step) for point in points]
    lines = (
        Line("loss", [point.loss for point in points], BLUE),
        Line("accuracy", [point.accuracy for point in points], TEAL),
        Line("margin", [point.margin for point in points], AMBER, right=True, dashed=True),
    )
    return Curve(
        id="training", title="Training" if iteration is None else f"Training of iteration {iteration}",
        about="by step; the margin on the right axis", keys=tuple(_key(line, number) for line in lines),
        options=line_chart(steps, lines, label=_label("Training by step", lines, number), axis="step"),
        empty=not points,
    )  # fmt: skip


class _History:
    """A run's decided iterations as columns."""

    def __init__(self, view: RunView) -> None:
        self.decided: list[IterationView] = [one for one in view.iterations if one.record is not None]
        self.names = [str(one.iteration) for one in self.decided]
        self.metrics: list[IterationMetrics] = [one.record.metrics for one in self.decided if one.record is not None]
        self.marks: list[str | None] = [one.record.decision for one in self.decided if one.record is not None]

        tested = [one.record.test.n for one in self.decided if one.record is not None and one.record.test is not None]
        self.prompts = tested[-1] if tested else view.recipe.evaluation.max_prompts

    def of(self, field: str) -> list[float | None]:
        """One metric over the iterations."""
        return [getattr(metrics, field) for metrics in self.metrics]

    def seconds(self, stage: Stage) -> list[float | None]:
        """Seconds of one stage over the iterations."""
        return [one.record.seconds_by_stage.get(stage.value) for one in self.decided if one.record is not None]

    def chart(
        self, id: str, title: str, about: str, lines: Sequence[Line], show: Shown = number, *,
        bands: Sequence[Band] = (), share: bool = False, zero: bool = False,
    ) -> Curve:  # fmt: skip
        """A line chart over the iterations. Lines without any value are left out."""
        known = [line for line in lines if any(value is not None for value in line.values)]
        options = line_chart(
            self.names, known, bands=bands, share=share, zero=zero, label=_label(f"{title} by iteration", known, show)
        )
        return Curve(id, title, about, tuple(_key(line, show) for line in known), options, not known)


def _reward(history: _History) -> Curve:
    mean, deviation = history.of("proxy_reward"), history.of("proxy_reward_std")
    half = [None if sd is None else Z * sd / math.sqrt(history.prompts) for sd in deviation]
    low, high = _around(mean, half)
    return history.chart(
        "reward", "Held-out reward", "candidate, and the incumbent it had to beat; shaded: 95 % interval",
        (
            Line("candidate", mean, BLUE, marks=history.marks),
            Line("incumbent", history.of("incumbent_reward"), SLATE, dashed=True),
        ),
        bands=(Band("interval", low, high, BLUE),),
    )  # fmt: skip


def _sampled(history: _History) -> Curve:
    best, spread = history.of("sampled_reward_best"), history.of("sampled_reward_spread")
    worst = [None if b is None or s is None else b - s for b, s in zip(best, spread, strict=True)]
    return history.chart(
        "sampled", "Sampled reward", "over each prompt's n responses; shaded: worst to best",
        (
            Line("best", best, GREEN), Line("mean", history.of("sampled_reward_mean"), BLUE),
            Line("spread", spread, AMBER, dashed=True),
        ),
        bands=(Band("range", worst, best, GREEN),),
    )  # fmt: skip


def _win_rate(history: _History) -> Curve:
    lines: list[Line] = []
    bands: list[Band] = []
    judges = sorted({judged.judge for one in history.decided for judged in one.judgements})
    for judge, colour in zip(judges, (AMBER, VIOLET, GREEN) * len(judges), strict=False):
        verdicts = [
            next((judged.verdict for judged in one.judgements if judged.judge == judge), None)
            for one in history.decided
        ]
        rates = [None if verdict is None else verdict.win_rate for verdict in verdicts]
        lines.append(Line(f"judge {judge}", rates, colour, marks=history.marks))
        low = [None if verdict is None else verdict.low for verdict in verdicts]
        high = [None if verdict is None else verdict.high for verdict in verdicts]
        bands.append(Band(f"{judge} interval", low, high, colour))
    lines += [
        Line("vs reference", history.of("win_rate_vs_reference"), BLUE),
        Line("vs incumbent", history.of("win_rate_vs_incumbent"), SLATE, dashed=True),
    ]
    about = "by reward on held-out prompts" + (", and by the judge; shaded: 95 % interval" if judges else "")
    return history.chart("win_rate", "Win rate", about, lines, percent, bands=bands, share=True)


def _kl(history: _History) -> Curve:
    return history.chart(
        "kl", "KL to the reference", "nats per response", (Line("KL", history.of("kl"), VIOLET, marks=history.marks),),
        zero=True,
    )  # fmt: skip


def _length(history: _History) -> Curve:
    return history.chart(
        "length", "Response length", "tokens",
        (
            Line("held-out", history.of("response_tokens"), BLUE),
            Line("sampled", history.of("sampled_response_tokens"), TEAL, dashed=True),
        ),
        lambda value: number(value, 1),
    )  # fmt: skip


def _correlation(history: _History) -> Curve:
    return history.chart(
        "correlation", "Reward and length", "mean correlation within a prompt; far above 0: longer is being rewarded",
        (Line("correlation", history.of("reward_length_correlation"), ROSE),), zero=True,
    )  # fmt: skip


def _dpo_loss(history: _History) -> Curve:
    return history.chart(
        "dpo_loss", "DPO loss", "mean of the last epoch", (Line("loss", history.of("dpo_loss"), BLUE),)
    )


def _dpo_accuracy(history: _History) -> Curve:
    return history.chart(
        "dpo_accuracy", "DPO accuracy", "pairs with a positive implicit margin",
        (Line("accuracy", history.of("dpo_accuracy"), TEAL),), percent, share=True,
    )  # fmt: skip


def _dpo_margin(history: _History) -> Curve:
    return history.chart(
        "dpo_margin", "DPO margin", "implicit reward, chosen minus rejected",
        (Line("margin", history.of("dpo_margin"), AMBER),),
    )  # fmt: skip


def _quality(history: _History) -> Curve:
    return history.chart(
        "quality", "Duplicates and truncation", "share of the sampled responses",
        (
            Line("duplicates", history.of("duplicate_fraction"), AMBER),
            Line("truncated", history.of("sampled_truncated_fraction"), ROSE, dashed=True),
        ),
        percent, share=True, zero=True,
    )  # fmt: skip


def _stages(history: _History) -> Curve:
    bars = [
        Line(stage.value, history.seconds(stage), colour)
        for stage, colour in zip(TIMED, STAGE_COLOURS, strict=True)
        if any(value for value in history.seconds(stage))
    ]
    return Curve(
        "stages", "Seconds per stage", "from a stage's first start to its last end; stages overlap",
        tuple(_key(bar, duration) for bar in bars),
        bar_chart(history.names, bars, label=_label("Seconds per stage by iteration", bars, duration)), not bars,
    )  # fmt: skip


def _pairs(history: _History) -> Curve:
    return history.chart(
        "pairs", "Pairs", "made of the prompts drawn",
        (
            Line("pairs", history.of("pairs"), BLUE),
            Line("prompts", history.of("prompts"), SLATE, dashed=True),
        ),
        count, zero=True,
    )  # fmt: skip


_CURVES = (
    _reward, _win_rate, _sampled, _kl, _length, _correlation, _dpo_loss, _dpo_accuracy, _dpo_margin, _stages, _quality,
    _pairs,
)  # fmt: skip


def _around(centre: Values, deviation: Values) -> tuple[list[float | None], list[float | None]]:
    pairs = list(zip(centre, deviation, strict=True))
    return (
        [None if c is None or d is None else c - d for c, d in pairs],
        [None if c is None or d is None else c + d for c, d in pairs],
    )


def _latest(values: Values) -> float | None:
    return next((value for value in reversed(values) if value is not None), None)


def _key(line: Line, show: Shown) -> Key:
    return Key(line.name, line.colour, show(_latest(line.values)), line.dashed)


def _label(title: str, lines: Sequence[Line], show: Shown) -> str:
    latest = ", ".join(f"{line.name} {show(_latest(line.values))}" for line in lines)
    return f"{title}. Latest: {latest}." if latest else f"{title}. No data yet."
