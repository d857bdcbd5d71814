"""The worker: claims jobs, runs their handlers, and stays alive whatever happens to Redis."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping

from services.contracts.errors import Fenced
from services.platform.jobs.attempt import Attempt
from services.platform.jobs.context import Handler
from services.platform.jobs.outage import REDIS_ERRORS, Outage
from services.platform.jobs.queue import JobQueue
from services.platform.jobs.records import Claim
from services.platform.logs import get_logger
from services.platform.metrics import JOBS_RUNNING, start_counters

log = get_logger(__name__)


class Worker:
    """Runs jobs of some queues in this process.

    Args:
        queue: Where jobs come from.
        queues: Queue name -> how many of its jobs run at once.
        handlers: Job kind -> who does it. A job of another kind fails at once.
        name: Shown as the job's worker and in its events; make it tell the process (`orchestrator-host-pid`).
    """

    def __init__(
        self, queue: JobQueue, *, queues: Mapping[str, int], handlers: Mapping[str, Handler], name: str
    ) -> None:
        self.queue = queue
        self.queues = dict(queues)
        self.handlers = dict(handlers)
        self.name = name
        self.last_progress_at = time.monotonic()
        self._outage = Outage(queue.redis, queue.settings.reconnect_max_seconds, client="worker")
        start_counters(queues)
        self._attempts: dict[asyncio.Task[None], Attempt] = {}

    @property
    def running(self) -> int:
        """Jobs whose handler runs now."""
        return len(self._attempts)

    @property
    def redis_error(self) -> str | None:
        """Why Redis cannot be used at the moment, for readiness; None when it can."""
        return f"Redis at {self._outage.server}: {self._outage.error}" if self._outage.error else None

    @property
    def seconds_since_progress(self) -> float:
        """Age of the last turn of any of the worker's loops, for liveness. Turns go on while Redis is away."""
        return time.monotonic() - self.last_progress_at

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; then claim no more, wait `stop_grace_seconds`, and give back what is unfinished."""
        log.info("worker_started", worker=self.name, queues=self.queues, kinds=sorted(self.handlers))
        try:
            async with asyncio.TaskGroup() as group:
                for queue, slots in self.queues.items():
                    group.create_task(self._serve(queue, slots, stop))
                    group.create_task(self._reclaim(queue, stop))
            await self._wind_down()
        finally:
            for task in self._attempts:
                task.cancel()
        log.info("worker_stopped", worker=self.name)

    def _alive(self) -> None:
        self.last_progress_at = time.monotonic()

    async def _serve(self, queue: str, slots: int, stop: asyncio.Event) -> None:
        mine: set[asyncio.Task[None]] = set()
        stopped = asyncio.create_task(stop.wait())
        # A claim is not interrupted by a stop: an entry in flight would wait out a lease.
        block = self.queue.settings.block_seconds
        failures = 0
        while not stop.is_set():
            self._alive()
            if len(mine) >= slots:
                await asyncio.wait({*mine, stopped}, return_when=asyncio.FIRST_COMPLETED, timeout=block)
                mine = {task for task in mine if not task.done()}
                continue
            try:
                claim = await self.queue.claim(queue, self.name, block)
                self._outage.over()
                failures = 0
                if claim and stop.is_set():
                    await self._put_back(claim)
                elif claim:
                    mine.add(self._start(claim))
            except REDIS_ERRORS as error:
                failures += 1
                self._outage.failed(f"claiming from queue {queue}", error)
                await asyncio.wait({stopped}, timeout=self._outage.delay_seconds(failures))
            except Exception:
                # A job that cannot even be read must not stop the others.
                failures += 1
                log.exception("claim_failed", queue=queue)
                await asyncio.wait({stopped}, timeout=self._outage.delay_seconds(failures))
            mine = {task for task in mine if not task.done()}
        stopped.cancel()

    async def _put_back(self, claim: Claim) -> None:
        try:
            await self.queue.release(claim)
        except Fenced:
            return

    def _start(self, claim: Claim) -> asyncio.Task[None]:
        job = claim.job
        attempt = Attempt(self.queue, claim, self.handlers.get(job.kind), self._outage, self._alive)
        task = asyncio.create_task(self._run(attempt), name=f"attempt {job.id}")
        self._attempts[task] = attempt
        task.add_done_callback(lambda done: self._attempts.pop(done, None))
        return task

    async def _run(self, attempt: Attempt) -> None:
        queue = attempt.claim.job.queue
        with JOBS_RUNNING.labels(queue).track_inprogress():
            try:
                await attempt.run()
            except Exception:
                log.exception(
                    "attempt_broke", job_id=attempt.claim.job.id, then="its lease runs out and it is repeated"
                )

    async def _reclaim(self, queue: str, stop: asyncio.Event) -> None:
        settings = self.queue.settings
        while not stop.is_set():
            # After an outage that all shared, owners get one lease to renew before anyone takes their jobs.
            if time.monotonic() - self._outage.healthy_since > settings.lease_seconds and self._outage.error is None:
                try:
                    taken = await self.queue.reclaim(queue, self.name)
                    if taken:
                        log.warning("jobs_reclaimed", queue=queue, count=taken, reason="no heartbeat for a lease")
                except REDIS_ERRORS as error:
                    self._outage.failed(f"looking for dead leases in queue {queue}", error)
                except Exception:
                    log.exception("reclaim_failed", queue=queue)
            try:
                # Spread, so that workers started together do not all look at once.
                await asyncio.wait_for(stop.wait(), settings.reclaim_seconds * random.uniform(0.8, 1.2))
            except TimeoutError:
                continue

    async def _wind_down(self) -> None:
        settings = self.queue.settings
        for attempt in self._attempts.values():
            attempt.end_by(settings.stop_grace_seconds + settings.cancel_grace_seconds)
        if self._attempts:
            await asyncio.wait(set(self._attempts), timeout=settings.stop_grace_seconds)
        for attempt in list(self._attempts.values()):
            attempt.give_back()
        if self._attempts:
            await asyncio.wait(set(self._attempts), timeout=settings.cancel_grace_seconds + settings.stop_grace_seconds)
        for attempt in self._attempts.values():
            # Not given back while its handler may still run: two at once is worse than a lease's wait.
            log.error(
                "handler_does_not_end", job_id=attempt.claim.job.id, then="its lease runs out and another repeats it"
            )
