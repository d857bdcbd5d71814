"""The curve of the training under way, gathered from its progress events in bounded memory. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from services.contracts.jobs import Event
from services.contracts.runs import Stage

MOST_POINTS = 400
"""As many as a chart has pixels to show; above it every second point goes."""


@dataclass(frozen=True)
class TrainingPoint:
    """What was logged at one step."""

    step: int
    loss: float | None
    accuracy: float | None
    margin: float | None


@dataclass
class TrainingCurve:
    """Loss, accuracy and margin by step, of the latest training of a run.

    Attributes:
        iteration: The iteration that is being trained; None before the first.
    """

    iteration: int | None = None
    total_steps: int = 0
    points: list[TrainingPoint] = field(default_factory=list[TrainingPoint])
    _gap: float = 0.0

    def add(self, event: Event) -> bool:
        """Take an event of the run's stream; whether it changed the curve."""
        iteration = trained_iteration(event.job_id)
        if iteration is None:
            return False
        if iteration != self.iteration:
            self.restart(iteration)
        return event.type == "job.progress" and self._take(event.data)

    def restart(self, iteration: int) -> None:
        """Forget the points: another training begins."""
        self.iteration, self.total_steps, self.points = iteration, 0, []
        self._gap = 0.0

    def _take(self, figures: dict[str, Any]) -> bool:
        point = point_of(figures)
        if point is None:
            return False
        self.total_steps = int(figures.get("total_steps") or 0)
        # A killed training resumes from an earlier step; what it had logged beyond it did not last.
        while self.points and self.points[-1].step >= point.step:
            self.points.pop()
        if len(self.points) > 1 and self.points[-1].step - self.points[-2].step < self._gap:
            self.points[-1] = point
        else:
            self.points.append(point)
        if len(self.points) > MOST_POINTS:
            self._gap = 2 * (point.step - self.points[0].step) / MOST_POINTS
            self.points = [*self.points[:-1:2], point]
        return True


def trained_iteration(job_id: str | None) -> int | None:
    """Iteration of a training job's id `{run}/iter-{t}/train`; None for any other job."""
    parts = (job_id or "").split("/")
    if len(parts) != 3 or parts[2] != Stage.TRAIN.value or not parts[1].startswith("iter-"):
        return None
    number = parts[1].removeprefix("iter-")
    return int(number) if number.isdigit() else None


def point_of(figures: dict[str, Any]) -> TrainingPoint | None:
    """A point, if the figures hold a step and a loss."""
    if figures.get("loss") is None or figures.get("step") is None:
        return None

    def of(name: str) -> float | None:
        value = figures.get(name)
        return None if value is None else float(value)

    return TrainingPoint(int(figures["step"]), of("loss"), of("accuracy"), of("margin"))


def points_of(curve: Iterable[dict[str, Any]]) -> list[TrainingPoint]:
    """Points of a finished training's result."""
    return [point for figures in curve if (point := point_of(figures)) is not None]
