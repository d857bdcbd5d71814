"""How jobs and events look inside Redis: keys, hashes, stream entries. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.contracts.jobs import Event, Job, JobOutcome, JobState
from services.contracts.problems import Problem


@dataclass(frozen=True)
class Keys:
    """Names of the keys under one prefix."""

    prefix: str

    def job(self, job_id: str) -> str:
        """Hash of one job."""
        return f"{self.prefix}:job:{job_id}"

    def queue(self, queue: str) -> str:
        """Stream of the jobs that wait or run."""
        return f"{self.prefix}:queue:{queue}"

    def delayed(self, queue: str) -> str:
        """Sorted set of the jobs that wait for their next attempt, by the ms it is due."""
        return f"{self.prefix}:delayed:{queue}"

    def jobs(self, queue: str) -> str:
        """Sorted set of every job of a queue, by the µs it was enqueued."""
        return f"{self.prefix}:jobs:{queue}"

    def events(self, topic: str) -> str:
        """Stream of a topic's events."""
        return f"{self.prefix}:events:{topic}"

    @property
    def inbox(self) -> str:
        """Stream of messages to the orchestrator."""
        return f"{self.prefix}:inbox"


@dataclass(frozen=True)
class Claim:
    """A worker's right to run a job, while its fence is the highest and its lease is renewed."""

    job: Job
    fence: int
    entry: str
    worker: str


@dataclass(frozen=True)
class QueueDepth:
    """Jobs of a queue that nobody works on."""

    waiting: int
    """Any worker may take them now."""
    delayed: int
    """They failed, and the time of their next attempt has not come."""
    oldest_seconds: float
    """How long the oldest of the waiting ones has waited; 0 when none waits."""


def encode(value: Mapping[str, Any]) -> str:
    """JSON in one canonical form, so that equal payloads are equal strings.

    Raises:
        TypeError: Something inside is not JSON.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def fields(flat: Sequence[str]) -> dict[str, str]:
    """A hash as Lua returns it (name, value, name, value, …)."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def job_from(record: Mapping[str, str]) -> Job:
    """A job's hash as a `Job`."""

    def parsed(name: str) -> dict[str, Any] | None:
        return json.loads(record[name]) if record.get(name) else None

    def seconds(name: str) -> float | None:
        return float(record[name]) if record.get(name) else None

    problem = record.get("problem")
    return Job(
        id=record["id"],
        queue=record["queue"],
        kind=record["kind"],
        payload=json.loads(record["payload"]),
        topic=record["topic"],
        max_attempts=int(record["max_attempts"]),
        state=JobState(record["state"]),
        fence=int(record["fence"]),
        attempts=int(record["attempts"]),
        worker=record.get("worker"),
        cancel_requested=record.get("cancel") == "1",
        progress=parsed("progress"),
        result=parsed("result"),
        problem=Problem.model_validate_json(problem) if problem else None,
        enqueued_at=float(record["enqueued_at"]),
        started_at=seconds("started_at"),
        finished_at=seconds("finished_at"),
    )


def event_from(topic: str, entry: str, record: Mapping[str, str]) -> Event:
    """A stream entry as an `Event`. Its time is in its id: Redis' clock, in ms."""
    return Event(
        id=entry,
        at=int(entry.partition("-")[0]) / 1000,
        type=record["type"],
        topic=topic,
        job_id=record.get("job_id") or None,
        kind=record.get("kind") or None,
        data=json.loads(record["data"]),
    )


def outcome_from(record: Mapping[str, str]) -> JobOutcome:
    """An inbox message. A nudge names no job, so its `job_id` is empty."""
    return JobOutcome(job_id=record["job_id"], topic=record["topic"], state=JobState(record["state"]))
