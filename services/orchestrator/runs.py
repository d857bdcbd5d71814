"""What people can ask of runs. Every change is written to the store first; Redis is told afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

from services.contracts import layout
from services.contracts.errors import Conflict, ConnectionLost, InvalidInput, RatchetError, Unavailable
from services.contracts.jobs import JobState
from services.contracts.judgements import Judgement, Verdict
from services.contracts.runs import (
    IterationsRequest,
    IterationView,
    Rollback,
    RollbackRequest,
    RunControl,
    RunCreated,
    RunRequest,
    RunStatus,
    RunView,
    ShownIterations,
)
from services.orchestrator.clock import now_iso
from services.orchestrator.conductor import Conductor, shown_status
from services.orchestrator.creation import check_report_to, create_run
from services.orchestrator.events import tell_change
from services.orchestrator.settings import OrchestratorSettings
from services.orchestrator.snapshots import Snapshot
from services.orchestrator.views import DecidedViews, live_view, run_view
from services.platform.http import ServiceClient
from services.platform.jobs.outage import REDIS_ERRORS, server_of
from services.platform.logs import get_logger

log = get_logger(__name__)

POLL_SECONDS = 0.1


class RunService:
    """Creates, shows and controls runs."""

    def __init__(
        self, conductor: Conductor, settings: OrchestratorSettings, trainer: ServiceClient | None = None
    ) -> None:
        self.conductor = conductor
        self.snapshots = conductor.snapshots
        self.runbook = conductor.snapshots.runbook
        self.queue = conductor.queue
        self.settings = settings
        self._trainer = trainer
        self._creating = asyncio.Lock()
        self._decided = DecidedViews()
        self._left_out: dict[str, str] = {}

    async def create(self, request: RunRequest) -> RunCreated:
        """Create a run and start it. Raises InvalidInput, Conflict."""
        once = request.id is None
        if once:
            await self._reach("create a run")
        told = await check_report_to(self.runbook, request, self._trainer, self.settings.health_seconds)
        async with self._creating:
            record, new = await asyncio.to_thread(create_run, self.runbook, request, told)
        data = {"iterations": record.recipe.iterations, "warnings": list(record.warnings)}
        async with self._written(f"run {record.id} is created", once=once):
            await self._tell(record.id, "run.created" if new else None, data)
            shot = await self._take(record.id)
            return RunCreated(id=record.id, status=self._status(shot), warnings=record.warnings)

    async def list(self, iterations: ShownIterations = "all") -> list[RunView]:
        """All runs, newest first. One that cannot be read is logged and left out, so that the others are seen."""
        kept = {"all": slice(None), "latest": slice(-1, None), "none": slice(0)}[iterations]
        ids = await asyncio.to_thread(self._all)
        views = [await self.readable(run) for run in reversed(ids)]
        return [view.model_copy(update={"iterations": view.iterations[kept]}) for view in views if view is not None]

    async def readable(self, run: str) -> RunView | None:
        """A run as it stands; None, and logged once, when it cannot be read. Raises Unavailable."""
        try:
            view = await self.view(run)
        except Unavailable:
            raise  # Redis is away, for every run
        except RatchetError as error:
            if self._left_out.get(run) != error.detail:
                log.error("run_unreadable", run=run, problem=error.detail)
            self._left_out[run] = error.detail
            return None
        self._left_out.pop(run, None)
        return view

    def _all(self) -> list[str]:
        self.runbook.refresh()
        return self.runbook.ids()

    async def view(self, run: str) -> RunView:
        """A run as it stands. Raises NotFound."""
        return await self._view(await self._take(run))

    async def iteration(self, run: str, iteration: int) -> IterationView:
        """One iteration. Raises NotFound when it has not been asked for."""
        await asyncio.to_thread(self.runbook.check_asked, run, iteration)
        shot = await self._take(run)
        if iteration in shot.decided:
            return (await self._shown(shot))[iteration]
        return live_view(shot.record, iteration, shot.jobs, now=time.time())

    async def judge(self, run: str, iteration: int, judge: str, verdict: Verdict) -> Judgement:
        """Record what a judge says of a decided iteration, once. Raises NotFound, InvalidInput, Conflict."""
        judgement, new = await asyncio.to_thread(self.runbook.judge, run, iteration, judge, verdict)
        if new:
            data = {"iteration": iteration, "judge": judge, "win_rate": verdict.win_rate}
            async with self._redis(f"tell of the judgement, which is recorded (run {run})"):
                await tell_change(self.conductor.events, run, "run.judged", data)
        return judgement

    async def add_iterations(self, run: str, request: IterationsRequest) -> RunView:
        """Trigger the next iterations."""

        def change(control: RunControl) -> RunControl:
            if control.cancelled:
                raise Conflict(f"run {run} is cancelled; resume it first", field="id")
            return control.model_copy(update={"iterations": control.iterations + request.count})

        return await self._change(run, "iterations", change, {"count": request.count}, once=True)

    async def pause(self, run: str) -> RunView:
        """Enqueue nothing more; what runs, ends (a chunk, a training)."""
        return await self._change(run, "pause", lambda control: control.model_copy(update={"paused": True}))

    async def cancel(self, run: str) -> RunView:
        """Stop what runs, within seconds. What is published stays, and `resume` goes on from there."""
        return await self._change(run, "cancel", lambda control: control.model_copy(update={"cancelled": True}))

    async def resume(self, run: str) -> RunView:
        """Go on after a pause, a cancellation or a failure: failed and cancelled jobs get all their attempts again.

        Raises:
            Conflict: jobs that were cancelled have not stopped yet.
        """
        await self._change(
            run, "resume", lambda control: control.model_copy(update={"paused": False, "cancelled": False})
        )
        await self._await_cancelled(run)
        async with self._redis("retry the failed jobs"):
            for job in (await self.snapshots.take(run)).jobs.values():
                if job.state in (JobState.FAILED, JobState.CANCELLED):
                    await self.queue.retry(job.id)
        await self._tell(run, None, {})
        return await self.view(run)

    async def rollback(self, run: str, request: RollbackRequest) -> RunView:
        """Set the incumbent back, from the next iteration on. An iteration under way is decided first.

        Raises:
            InvalidInput: the iteration has no decided policy.
        """

        def change(control: RunControl) -> RunControl:
            decided = self.runbook.decided(run)
            if request.to_iteration not in decided:
                known = ", ".join(str(t) for t in sorted(decided)) or "none yet"
                raise InvalidInput(
                    f"iteration {request.to_iteration} of run {run} has no decided policy to go back to "
                    f"(decided: {known})",
                    field="to_iteration",
                )
            current = len(decided)
            # Sampling begins once the prompts are drawn, and an iteration's data comes from one policy only.
            begun = self.runbook.store.exists(layout.prompts_file(run, current))
            rollback = Rollback(
                before_iteration=current + 1 if begun else current, to_iteration=request.to_iteration,
                reason=request.reason, at=now_iso(),
            )  # fmt: skip
            return control.model_copy(update={"rollbacks": (*control.rollbacks, rollback)})

        data = {"to_iteration": request.to_iteration, "reason": request.reason}
        return await self._change(run, "rollback", change, data, once=True)

    async def _change(
        self, run: str, action: str, change: Callable[[RunControl], RunControl], data: dict[str, Any] | None = None,
        *, once: bool = False,
    ) -> RunView:  # fmt: skip
        """Write a changed control to the store, then tell. Under the conductor's lock, so no plan is made between.

        Args:
            once: Doing it twice is not doing it once. So it is done only while Redis answers, and if Redis goes just
                then, the error is one that no client answers by sending the request again.
        """
        if once:
            await self._reach(f"do this ({action})")
        async with self._no_plan_made():
            await asyncio.to_thread(self._write, run, change)
        async with self._written(f"the change ({action}) of run {run} is written", once=once):
            await self._tell(run, "run.control", {"action": action, **(data or {})})
            return await self.view(run)

    async def _reach(self, doing: str) -> None:
        async with self._redis(f"{doing}; nothing was changed"):
            await self.queue.redis.ping()

    @asynccontextmanager
    async def _no_plan_made(self) -> AsyncGenerator[None]:
        """The conductor's lock, within a deadline: it is held over calls to Redis, which may hang."""
        try:
            async with asyncio.timeout(self.settings.control_seconds):
                await self.conductor.lock.acquire()
        except TimeoutError as error:
            raise Unavailable(
                f"the conductor is waiting for Redis or the store for more than {self.settings.control_seconds:g} s; "
                "nothing was changed",
                retry_after_seconds=5,
            ) from error
        try:
            yield
        finally:
            self.conductor.lock.release()

    @staticmethod
    @asynccontextmanager
    async def _written(what: str, *, once: bool) -> AsyncGenerator[None]:
        """After a change that counts each time: an outage from here on is not to be answered by asking again."""
        try:
            yield
        except Unavailable as error:
            if not once:
                raise
            raise ConnectionLost(
                f"{what} and takes effect when Redis is back; do not ask again. {error.detail}"
            ) from error

    async def check_events(self, run: str, after: str) -> None:
        """Before a stream is opened: the run exists, the event id is one, Redis answers. Raises what is wrong."""
        await asyncio.to_thread(self.runbook.record, run)
        await self.check_stream(run, after)

    async def check_stream(self, topic: str, after: str) -> None:
        """Before a stream is opened: the event id is one, Redis answers. Raises what is wrong."""
        async with self._redis(f"read the events of {topic}"):
            await self.conductor.events.read(topic, after, count=1)

    def _write(self, run: str, change: Callable[[RunControl], RunControl]) -> None:
        self.runbook.record(run)
        control = self.runbook.reread_control(run)
        changed = change(control)
        if changed != control:
            self.runbook.write_control(run, changed)

    async def _await_cancelled(self, run: str) -> None:
        deadline = time.monotonic() + self.settings.control_seconds
        while True:
            jobs = (await self._take(run)).jobs.values()
            ending = [job.id for job in jobs if job.cancel_requested and not job.state.final]
            if not ending:
                return
            if time.monotonic() > deadline:
                raise Conflict(
                    f"run {run} is still stopping ({', '.join(ending[:3])}); resume it again in a moment",
                    field="id", retry_after_seconds=5,
                )  # fmt: skip
            await asyncio.sleep(POLL_SECONDS)

    async def _take(self, run: str) -> Snapshot:
        async with self._redis(f"look at run {run}"):
            return await self.snapshots.take(run)

    async def _tell(self, run: str, event: str | None, data: dict[str, Any]) -> None:
        async with self._redis("tell of the change, which is written and takes effect when Redis is back"):
            if event is not None:
                await tell_change(self.conductor.events, run, event, data)
            await self.queue.nudge(run)

    def _status(self, shot: Snapshot) -> RunStatus:
        return shown_status(shot.plan, active=shot.record.id == self.conductor.active)

    async def _shown(self, shot: Snapshot) -> dict[int, IterationView]:
        judgements = await asyncio.to_thread(self.runbook.judgements, shot.record.id)
        return self._decided.of(shot.record, shot.decided, judgements)

    async def _view(self, shot: Snapshot) -> RunView:
        return run_view(
            shot.record, shot.control, shot.plan, shot.decided, shot.jobs, shown=await self._shown(shot),
            queued=shot.record.id != self.conductor.active, now=time.time(),
        )  # fmt: skip

    @asynccontextmanager
    async def _redis(self, doing: str) -> AsyncGenerator[None]:
        """Redis within a deadline, or a problem that names it."""
        try:
            async with asyncio.timeout(self.settings.redis_seconds):
                yield
        except REDIS_ERRORS as error:
            raise Unavailable(
                f"Redis at {server_of(self.queue.redis)} does not answer, so the orchestrator cannot {doing} "
                f"({type(error).__name__}: {error})",
                retry_after_seconds=5,
            ) from error
