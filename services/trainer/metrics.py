"""Prometheus metrics of the trainer; the naming scheme is in `services.platform.metrics`.

The figures of the running job (`loss`, `accuracy_ratio`, …) are there only while it trains.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from prometheus_client import Counter, Gauge, Histogram

from services.contracts.training import Tracker, TrainingProgress

KIB = 1024
MOST_OBSERVED_STEPS = 1000
"""Steps between two progress messages that are counted one by one in the histogram."""

RUNNING = Gauge("ratchet_trainer_job_running", "1 while a job of this kind runs in a child process.", ["kind"])
STEPS = Counter("ratchet_trainer_steps_total", "Optimiser steps, those done again after a kill included.", ["kind"])
STEP_SECONDS = Histogram(
    "ratchet_trainer_step_seconds",
    "Time of an optimiser step, a mean over the steps between two progress messages.",
    ["kind"],
    buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
)
PROGRESS = Gauge("ratchet_trainer_progress_ratio", "Steps done of the running job's steps.", ["kind"])
CHILD_DEATHS = Counter(
    "ratchet_trainer_child_deaths_total",
    "Training processes that ended without a result, by reason: killed (by a signal), hung, exited.",
    ["reason"],
)
RESUMES = Counter("ratchet_trainer_resumes_total", "Finished trainings that had gone on from a save.", ["kind"])
PEAK_MEMORY = Gauge(
    "ratchet_trainer_peak_memory_bytes",
    "Most memory that the last training process had: host (resident), device (allocated by torch).",
    ["kind", "memory"],
)
TRACKER_FAILURES = Counter(
    "ratchet_trainer_tracker_failures_total", "Trackers that a training gave up, and went on without.", ["tracker"]
)
FIGURES: dict[str, Gauge] = {
    field: Gauge(f"ratchet_trainer_{name}", f"{text}, of the running job.", ["kind"])
    for field, name, text in (
        ("loss", "loss", "Loss"),
        ("accuracy", "accuracy_ratio", "Pairs with a positive margin"),
        ("margin", "margin", "Mean margin"),
        ("learning_rate", "learning_rate", "Learning rate"),
        ("grad_norm", "grad_norm", "Norm of the gradient before clipping"),
        ("tokens_per_second", "tokens_per_second", "Tokens a second"),
        ("seconds_left", "left_seconds", "Time to the last step"),
    )
}
"""Field of `TrainingProgress` -> its gauge."""

for _reason in ("killed", "hung", "exited"):
    CHILD_DEATHS.labels(_reason)
for _tracker in get_args(Tracker):
    TRACKER_FAILURES.labels(_tracker)


class JobFigures:
    """Metrics of one attempt at a job, from its child's messages."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._step: int | None = None
        self._at = 0.0

    def update(self, progress: TrainingProgress, pid: int, device_bytes: int | None) -> None:
        """A message came."""
        PEAK_MEMORY.labels(self.kind, "host").set(peak_resident_bytes(pid))
        if device_bytes is not None:
            PEAK_MEMORY.labels(self.kind, "device").set(device_bytes)
        if progress.phase != "training":
            return
        now = time.monotonic()
        done = 0 if self._step is None else progress.step - self._step
        if done > 0:
            STEPS.labels(self.kind).inc(done)
            for _ in range(min(done, MOST_OBSERVED_STEPS)):
                STEP_SECONDS.labels(self.kind).observe((now - self._at) / done)
        self._step, self._at = progress.step, now
        if progress.total_steps:
            PROGRESS.labels(self.kind).set(progress.step / progress.total_steps)
        for field, gauge in FIGURES.items():
            value: float | None = getattr(progress, field)
            if value is not None:
                gauge.labels(self.kind).set(value)


@contextmanager
def job_figures(kind: str) -> Generator[JobFigures]:
    """Around an attempt: its figures go when it ends."""
    RUNNING.labels(kind).set(1)
    try:
        yield JobFigures(kind)
    finally:
        RUNNING.labels(kind).set(0)
        for gauge in (PROGRESS, *FIGURES.values()):
            gauge.clear()


def peak_resident_bytes(pid: int) -> int:
    """The most memory a process ever had resident; 0 when it has ended."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * KIB
    except OSError:
        return 0
    return 0
