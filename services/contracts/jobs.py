"""Jobs: what is queued, leased, run at least once and takes effect exactly once."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import Field

from services.contracts.model import Contract
from services.contracts.problems import Problem


class JobState(StrEnum):
    """A job's life. `succeeded`, `failed` and `cancelled` are final; `retry` brings a failed or cancelled job back."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """No worker will touch the job again, unless it is retried."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


class JobRequest(Contract):
    """What is enqueued. The id says what the job does, so enqueueing it twice is one job."""

    id: str = Field(min_length=1, max_length=300, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
    queue: str = Field(
        pattern=r"^[a-z][a-z0-9-]*$", description="Which workers take it: `generate`, `score`, `control`, `train`."
    )
    kind: str
    payload: dict[str, Any] = Field(description="JSON of the kind's own contract; validated by the handler.")
    topic: str = Field(description="Event stream its progress goes to: the run's id, or the job's own.")
    max_attempts: int = Field(default=4, ge=1, le=20)


class Job(Contract):
    """A job as the queue knows it."""

    id: str
    queue: str
    kind: str
    payload: dict[str, Any]
    topic: str
    max_attempts: int
    state: JobState
    fence: int = Field(default=0, description="Grows with each claim; a result with a lower fence is refused.")
    attempts: int = 0
    worker: str | None = None
    cancel_requested: bool = False
    progress: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    problem: Problem | None = None
    enqueued_at: float = Field(description="Seconds since the epoch, by Redis' clock.")
    started_at: float | None = None
    finished_at: float | None = None


class Event(Contract):
    """One entry of a topic's event stream. `id` is the Redis stream id: give it back as `Last-Event-ID` to continue."""

    id: str
    at: float
    type: str = Field(
        description="`job.queued`, `job.started`, `job.progress`, `job.succeeded`, `job.failed`, `run.*`, …"
    )
    topic: str
    job_id: str | None = None
    kind: str | None = None
    data: dict[str, Any] = Field(default_factory=dict)


class JobOutcome(Contract):
    """Message to the orchestrator's inbox: a job reached a final state."""

    job_id: str
    topic: str
    state: JobState
