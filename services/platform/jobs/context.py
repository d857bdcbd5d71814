"""What a handler is given, and what it may tell."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from services.contracts.jobs import Job
from services.platform.jobs.records import encode


class JobContext:
    """One attempt at a job, as its handler sees it.

    Attributes:
        job: The job; validate `job.payload` with the kind's own contract.
        fence: Part of the name of every file the attempt writes, so that attempts never write to the same one.
        cancelled: Set when the job was cancelled: clean up and return; after a grace the handler's task is cancelled.
        lost: Set when another worker has the job; the handler's task is cancelled, its result dropped.
    """

    def __init__(self, job: Job, fence: int) -> None:
        self.job = job
        self.fence = fence
        self.cancelled = asyncio.Event()
        self.lost = asyncio.Event()
        self.figures: dict[str, Any] | None = None
        self.progressed_at = time.monotonic()
        self._unsent = False

    def progress(self, **figures: Any) -> None:
        """Remember figures (JSON values), merged over earlier ones; sent with a heartbeat. Thread-safe.

        Raises:
            TypeError: A figure is not JSON.
        """
        encode(figures)
        self.figures = {**(self.figures or {}), **figures}
        self.progressed_at = time.monotonic()
        self._unsent = True

    def take_unsent(self) -> dict[str, Any] | None:
        """For the worker: figures not sent yet, if any. They then count as sent."""
        if not self._unsent:
            return None
        self._unsent = False
        return self.figures

    def put_back(self) -> None:
        """For the worker: the last figures taken did not reach Redis."""
        self._unsent = self.figures is not None


Handler = Callable[[JobContext], Awaitable[dict[str, Any]]]
"""Does one kind of job; returns its result (JSON). A retryable `RatchetError` is tried again, others fail the job."""
