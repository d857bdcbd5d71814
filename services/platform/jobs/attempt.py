"""One attempt at a job: runs the handler while renewing the lease, then commits how it ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from services.contracts.errors import DeadlineExceeded, Fenced, InvalidInput, JobFailed, RatchetError
from services.contracts.problems import Problem
from services.contracts.tracing import job_place
from services.platform.jobs.context import Handler, JobContext
from services.platform.jobs.outage import REDIS_ERRORS, Outage
from services.platform.jobs.queue import Beat, JobQueue
from services.platform.jobs.records import Claim, encode
from services.platform.logs import get_logger, log_context
from services.platform.metrics import JOB_ATTEMPTS, JOB_SECONDS, JOBS_DEAD, JOBS_RETRIED
from services.platform.tracing import trace_of_job, traced

log = get_logger(__name__)

STUBBORN_LOG_SECONDS = 30.0
"""A handler that does not end after its task was cancelled is named in the log this often."""


class Attempt:
    """One claim on its way to its end.

    Args:
        queue: Where the claim is from.
        claim: What to do.
        handler: Who does it; None when this worker knows no handler for the kind.
        outage: Shared knowledge of Redis' health.
        alive: Called whenever something got on, for the worker's liveness.
    """

    def __init__(
        self, queue: JobQueue, claim: Claim, handler: Handler | None, outage: Outage, alive: Callable[[], None]
    ) -> None:
        self.queue = queue
        self.claim = claim
        self.context = JobContext(claim.job, claim.fence)
        self._settings = queue.settings
        self._handler = handler
        self._outage = outage
        self._alive = alive
        self._task: asyncio.Task[dict[str, Any]] | None = None
        self._cancel_at: float | None = None
        self._cancelled_task_at: float | None = None
        self._stalled = False
        self._releasing = False
        self._commit_until: float | None = None

    def end_by(self, seconds: float) -> None:
        """The worker stops: an outcome that Redis does not take within so many seconds is given up."""
        self._commit_until = time.monotonic() + seconds

    def give_back(self) -> None:
        """The worker stops: cancel the handler; its job goes back to the queue."""
        if self._task and not self._task.done():
            self._releasing = True
            self._stop_handler("worker stops")

    async def run(self) -> None:
        """From claim to committed outcome."""
        job = self.claim.job
        started = time.monotonic()
        with traced(trace_of_job(job.id)), log_context(**_ids(self.claim)):
            log.info("job_started", kind=job.kind, attempt=job.attempts)
            task = self._task = asyncio.create_task(self._handle(), name=f"job {job.id}")
            try:
                await self._keep_lease(task)
            finally:
                task.cancel()
            outcome = await self._settle(task)
            seconds = time.monotonic() - started
            log.info("job_ended", kind=job.kind, outcome=outcome, seconds=round(seconds, 3))
        JOB_ATTEMPTS.labels(job.queue, outcome).inc()
        if outcome == "failed":
            JOBS_DEAD.labels(job.queue).inc()
        if outcome == "retried":
            JOBS_RETRIED.labels(job.queue, "error").inc()
        JOB_SECONDS.labels(job.queue, job.kind).observe(seconds)

    async def _handle(self) -> dict[str, Any]:
        if self._handler is None:
            raise InvalidInput(
                f"no handler here for jobs of kind {self.claim.job.kind!r} (queue {self.claim.job.queue!r})",
                field="kind",
            )
        result = await self._handler(self.context)
        encode(result)  # What cannot be written is the handler's error, found here.
        return result

    async def _keep_lease(self, task: asyncio.Task[dict[str, Any]]) -> None:
        tick = min(self._settings.heartbeat_seconds, self._settings.event_interval_seconds)
        next_beat = time.monotonic() + self._settings.heartbeat_seconds
        while not task.done():
            await asyncio.wait({task}, timeout=tick)
            self._alive()
            self._enforce()
            unsent = self.context.take_unsent()
            if task.done() or self.context.lost.is_set() or (unsent is None and time.monotonic() < next_beat):
                continue
            next_beat = time.monotonic() + self._settings.heartbeat_seconds
            try:
                async with asyncio.timeout(self._settings.lease_seconds / 3):
                    beat = await self.queue.heartbeat(self.claim, unsent)
            except REDIS_ERRORS as error:
                # The handler goes on: if nobody else can reach Redis either, the lease is still ours afterwards.
                self.context.put_back()
                self._outage.failed("renewing a lease", error)
                continue
            self._outage.over()
            self._obey(beat)

    def _obey(self, beat: Beat) -> None:
        if beat is Beat.LOST:
            log.warning(
                "job_lost", kind=self.claim.job.kind, reason="another worker has it, or it ended; this attempt stops"
            )
            self.context.lost.set()
            self._stop_handler("lost")
        elif beat is Beat.CANCEL and not self.context.cancelled.is_set():
            log.info("job_cancelling", grace_seconds=self._settings.cancel_grace_seconds)
            self.context.cancelled.set()
            self._cancel_at = time.monotonic() + self._settings.cancel_grace_seconds

    def _enforce(self) -> None:
        now = time.monotonic()
        if self._cancel_at is not None and now >= self._cancel_at:
            self._cancel_at = None
            self._stop_handler("cancelled")
        stall = self._settings.stall_seconds
        if stall is not None and self._cancelled_task_at is None and now - self.context.progressed_at > stall:
            self._stalled = True
            self._stop_handler(f"no progress for {stall} s")
        if self._cancelled_task_at is not None and now - self._cancelled_task_at > STUBBORN_LOG_SECONDS:
            self._cancelled_task_at = now
            log.warning(
                "handler_does_not_end", kind=self.claim.job.kind, remedy="its handler must not swallow CancelledError"
            )

    def _stop_handler(self, reason: str) -> None:
        if self._task and not self._task.done():
            log.info("handler_cancelled", reason=reason)
            self._cancelled_task_at = time.monotonic()
            self._task.cancel()

    async def _settle(self, task: asyncio.Task[dict[str, Any]]) -> str:
        """Commit how the handler ended; returns the outcome's name."""
        claim, queue = self.claim, self.queue
        error = None if task.cancelled() else task.exception()
        if self.context.lost.is_set():
            return "lost"
        if self.context.cancelled.is_set():
            return await self._commit("cancelled", lambda: queue.finish_cancelled(claim))
        if not task.cancelled() and error is None:
            result = task.result()
            return await self._commit("succeeded", lambda: queue.finish(claim, result, progress=self.context.figures))
        if self._releasing:
            return await self._commit("released", lambda: queue.release(claim))
        problem, retry, delay = self._diagnose(error)
        ended = "retried" if retry and claim.job.attempts < claim.job.max_attempts else "failed"
        return await self._commit(ended, lambda: queue.fail(claim, problem, retry=retry, delay_seconds=delay))

    def _diagnose(self, error: BaseException | None) -> tuple[Problem, bool, float]:
        """Problem of a failed attempt, whether another may help, and after how many seconds."""
        job = self.claim.job
        delay = self._settings.retry_delay_seconds(job.attempts)
        if self._stalled:
            stalled = DeadlineExceeded(
                f"job {job.id}: no progress for stall_seconds={self._settings.stall_seconds}; it was stopped"
            )
            return stalled.problem(), True, delay
        if isinstance(error, RatchetError):
            log.warning("job_attempt_failed", code=error.code, error=error.detail, retryable=error.retryable)
            wait = error.retry_after_seconds if error.retry_after_seconds is not None else delay
            return error.problem(), error.retryable, wait
        # A CancelledError that nobody here asked for is a handler's mistake like any other.
        error = error or asyncio.CancelledError("raised inside the handler")
        log.error("job_attempt_crashed", kind=job.kind, attempt=job.attempts, exc_info=error)
        crash = JobFailed(f"{job.kind} job {job.id}: {type(error).__name__}: {error} (traceback in the worker's log)")
        return crash.problem(), True, delay

    async def _commit(self, outcome: str, act: Callable[[], Awaitable[Any]]) -> str:
        """Tell Redis, as long as it takes: while it is away nobody takes the job, then the fence decides."""
        failures = 0
        while True:
            try:
                await act()
            except Fenced as error:
                log.warning("job_fenced", error=error.detail)
                return "lost"
            except REDIS_ERRORS as error:
                failures += 1
                self._alive()
                self._outage.failed(f"recording that a job {outcome}", error)
            else:
                self._outage.over()
                return outcome
            if self._commit_until is not None and time.monotonic() > self._commit_until:
                log.error(
                    "outcome_not_recorded", outcome=outcome, then="its lease runs out and another worker repeats it"
                )
                return "lost"
            await asyncio.sleep(self._outage.delay_seconds(failures))


def _ids(claim: Claim) -> dict[str, Any]:
    """What every line logged for this attempt says of the job."""
    place = job_place(claim.job.id)
    ids: dict[str, Any] = {"job_id": claim.job.id, "fence": claim.fence}
    if place is not None:
        ids |= {"run": place.run} if place.iteration is None else {"run": place.run, "iteration": place.iteration}
    return ids
