"""What the service and its child process say to each other: one job in, JSON lines out."""

from __future__ import annotations

from typing import Literal

from services.contracts.model import Contract
from services.contracts.problems import Problem
from services.contracts.training import TrainingJob, TrainingProgress, TrainingResult


class ChildJob(Contract):
    """The job file: everything the child needs. No token and no Redis address: it has no use for them."""

    job_id: str
    job: TrainingJob
    store_url: str
    work: str
    allow_hub: bool = False
    lock_seconds: float = 30.0


class ChildMessage(Contract):
    """One line of the child's. `ready`: imports are done, a job may come. `result` or `error` is a job's last."""

    type: Literal["ready", "progress", "result", "error"]
    progress: TrainingProgress | None = None
    result: TrainingResult | None = None
    problem: Problem | None = None
    retryable: bool = False
