"""What the service and its child process say to each other: one job in, JSON lines out."""

from __future__ import annotations

from typing import Literal

from services.contracts.model import Contract
from services.contracts.problems import Problem
from services.contracts.training import Tracker, TrainingJob, TrainingProgress, TrainingResult
from services.trainer.trackers import Tracking


class ChildJob(Contract):
    """The job file: everything the child needs. No token and no Redis address: it has no use for them."""

    job_id: str
    job: TrainingJob
    store_url: str
    work: str
    allow_hub: bool = False
    lock_seconds: float = 30.0
    tracking: Tracking | None = None


class TrackerFailure(Contract):
    """A tracker was given up; the training goes on."""

    tracker: Tracker
    detail: str


class ChildMessage(Contract):
    """One line of the child's. `ready`: imports are done, a job may come. `result` or `error` is a job's last."""

    type: Literal["ready", "progress", "tracker", "result", "error"]
    progress: TrainingProgress | None = None
    result: TrainingResult | None = None
    problem: Problem | None = None
    retryable: bool = False
    tracker: TrackerFailure | None = None
    device_peak_bytes: int | None = None
