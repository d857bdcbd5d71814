"""The conductor: wakes when a job ends or somebody asks for something, plans, and enqueues what the plans ask for.

Level-triggered: each turn looks at everything anew, so that a lost message, a restart or a wiped Redis is only a delay.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping

from services.contracts.errors import Conflict, RatchetError
from services.contracts.runs import RunStatus
from services.orchestrator import metrics
from services.orchestrator.events import tell_change
from services.orchestrator.planner import Plan
from services.orchestrator.settings import OrchestratorSettings
from services.orchestrator.snapshots import Snapshot, Snapshots
from services.orchestrator.stages import QUEUES
from services.orchestrator.trials import TrialGuard
from services.platform.jobs import EventStream, JobQueue
from services.platform.jobs.outage import REDIS_ERRORS, Outage
from services.platform.logs import get_logger
from services.platform.metrics import JOBS_DELAYED, JOBS_OLDEST, JOBS_WAITING

log = get_logger(__name__)

BLOCK_SECONDS = 1.0
"""A turn waits this long for a message, so a stop is seen within it."""
CONSUMER = "conductor"
SERVING_QUEUES = frozenset({"generate", "score", "control"})
"""Jobs of these queues decide which policy and which scorers are served; only one run may have any."""

MEASURE_SECONDS = 5.0
"""Queues and disk are measured this often; Prometheus comes every 15 s."""


class Conductor:
    """Drives all runs of the store, one at a time.

    Args:
        lock: Held while runs are looked at and jobs enqueued, and by whoever changes what is asked of a run.
    """

    def __init__(
        self, snapshots: Snapshots, events: EventStream, settings: OrchestratorSettings, trials: TrialGuard,
        lock: asyncio.Lock,
    ) -> None:  # fmt: skip
        self.snapshots = snapshots
        self.queue: JobQueue = snapshots.queue
        self.events = events
        self.settings = settings
        self.trials = trials
        self.lock = lock
        self.active: str | None = None
        self.last_turn_at = time.monotonic()
        self._statuses: dict[str, RunStatus] = {}
        self._left_out: dict[str, str] = {}
        self._me = uuid.uuid4().hex
        self._lease_key = f"{self.queue.settings.key_prefix}:conductor"
        self._outage = Outage(self.queue.redis, self.queue.settings.reconnect_max_seconds, client="conductor")
        self._measured_at = float("-inf")

    @property
    def seconds_since_turn(self) -> float:
        """Age of the last turn of the loop, for liveness. Turns go on while Redis is away."""
        return time.monotonic() - self.last_turn_at

    async def run(self, stop: asyncio.Event) -> None:
        """Conduct until `stop` is set. Outlives Redis and the store going away."""
        next_sweep = 0.0
        failures = 0
        while not stop.is_set():
            self.last_turn_at = time.monotonic()
            try:
                next_sweep = await self._turn(next_sweep)
                self._outage.over()
                failures = 0
                continue
            except REDIS_ERRORS as error:
                self._outage.failed("conducting", error)
                next_sweep = 0.0  # it may come back empty
            except RatchetError as error:
                log.error("conducting_failed", code=error.code, problem=error.detail)
            except Exception:
                log.exception("conducting_failed")
            failures += 1
            await _pause(stop, self._outage.delay_seconds(failures))
        await self._give_up_lease()
        metrics.hide_runs()

    async def _turn(self, next_sweep: float) -> float:
        if not await self._hold_lease():
            metrics.hide_runs()
            await asyncio.sleep(BLOCK_SECONDS)
            return 0.0
        metrics.CONDUCTING.set(1)
        await self._measure()
        block = 0.0 if time.monotonic() >= next_sweep else BLOCK_SECONDS
        messages = await self.queue.read_inbox(CONSUMER, block)
        sweep = time.monotonic() >= next_sweep
        if messages or sweep:
            await self.step(refresh=sweep or any(not outcome.job_id for _, outcome in messages))
            await self.queue.ack_inbox([entry for entry, _ in messages])
        return time.monotonic() + self.settings.sweep_seconds if sweep else next_sweep

    async def step(self, *, refresh: bool = True) -> None:
        """Look at every run once and do what the plans say.

        Args:
            refresh: Look for new runs and changed controls in the store first.
        """
        async with self.lock:
            runbook = self.snapshots.runbook
            if refresh:
                await asyncio.to_thread(runbook.refresh)
            shots = {run: shot for run in runbook.ids() if (shot := await self._look(run)) is not None}
            plans = {run: shot.plan for run, shot in shots.items()}
            self.active = choose(plans, {run: holds_services(shot) for run, shot in shots.items()}, self.active)
            for shot in shots.values():
                for job_id in shot.plan.cancel:
                    await self.queue.cancel(job_id)
            if self.active is not None:
                await self._enqueue(shots[self.active])
        await self._tell(shots)
        self.trials.look(shots, busy=self.active is not None)

    async def _look(self, run: str) -> Snapshot | None:
        """The run's snapshot. One that cannot be read is logged and left out, so that it does not stop the others; the
        run that works is waited for instead, for another must not take the generator from it."""
        try:
            shot = await self.snapshots.take(run)
        except RatchetError as error:
            if run == self.active:
                raise
            if self._left_out.get(run) != error.detail:
                log.error("run_unreadable", run=run, problem=error.detail)
            self._left_out[run] = error.detail
            return None
        self._left_out.pop(run, None)
        return shot

    async def _enqueue(self, shot: Snapshot) -> None:
        for request in shot.plan.requests:
            try:
                await self.queue.enqueue(request)
            except Conflict as error:
                log.error("enqueue_refused", job_id=request.id, problem=error.detail)

    async def _measure(self) -> None:
        """What only a look at the queues and the disk tells."""
        if time.monotonic() - self._measured_at < MEASURE_SECONDS:
            return
        for queue in sorted(set(QUEUES.values())):
            depth = await self.queue.depth(queue)
            JOBS_WAITING.labels(queue).set(depth.waiting)
            JOBS_DELAYED.labels(queue).set(depth.delayed)
            JOBS_OLDEST.labels(queue).set(depth.oldest_seconds)
        await asyncio.to_thread(metrics.show_disk, self.snapshots.runbook.store)
        self._measured_at = time.monotonic()

    async def _tell(self, shots: Mapping[str, Snapshot]) -> None:
        statuses = {run: shown_status(shot.plan, active=run == self.active) for run, shot in shots.items()}
        for run, status in statuses.items():
            planned = shots[run].plan
            before = self._statuses.get(run)
            if before is not status:
                data = {"status": status.value, "before": before.value if before else None}
                if planned.problem is not None:
                    data["problem"] = planned.problem.detail
                await tell_change(self.events, run, "run.status", data)
                log.info("run_status", run=run, **data)
            self._statuses[run] = status
        metrics.show_runs(
            statuses,
            {run: shot.decided for run, shot in shots.items()},
            {run: shot.control.iterations for run, shot in shots.items()},
        )

    async def _hold_lease(self) -> bool:
        """Whether this process is the one that conducts. A second one waits, ready to take over."""
        redis, milliseconds = self.queue.redis, round(self.settings.lease_seconds * 1000)
        if await redis.set(self._lease_key, self._me, nx=True, px=milliseconds):
            return True
        if await redis.get(self._lease_key) != self._me:
            return False
        await redis.pexpire(self._lease_key, milliseconds)
        return True

    async def _give_up_lease(self) -> None:
        try:
            if await self.queue.redis.get(self._lease_key) == self._me:
                await self.queue.redis.delete(self._lease_key)
        except REDIS_ERRORS:
            return  # it runs out by itself


def choose(plans: Mapping[str, Plan], holds: Mapping[str, bool], current: str | None) -> str | None:
    """The run that works now: one at a time, for there is one generator.

    Args:
        plans: By run, oldest first.
        holds: Whether jobs of the run that use the generator or the scorers are queued or running; such a run is waited
            for, even when it was paused or cancelled meanwhile.
        current: The run that worked until now; it is not interrupted by an older one that was resumed.
    """
    for run in plans:
        if holds[run]:
            return run
    working = [run for run, planned in plans.items() if planned.status is RunStatus.RUNNING]
    if current in working:
        return current
    return next((run for run in working if plans[run].live), working[0] if working else None)


def shown_status(planned: Plan, *, active: bool) -> RunStatus:
    """`queued` while another run works."""
    return RunStatus.QUEUED if planned.status is RunStatus.RUNNING and not active else planned.status


def holds_services(shot: Snapshot) -> bool:
    """Whether a job of the run that decides what the generator or the reward service holds is queued or running."""
    return any(shot.jobs[id].queue in SERVING_QUEUES for id in shot.plan.live)


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return
