"""Taking turns with the generator on one device: a job leases it before its training process starts.

The generator's vLLM sleeps while the lease is renewed, and wakes by itself when it is not. So the training process is
ended *before* the lease could run out unrenewed: never do both use the device. The lease is given back once the process
has ended, with all it started, for only then is its memory free. One that SIGKILL does not end (it hangs in a driver)
keeps its lease, renewed and logged as an error each minute, for as long as this trainer runs: it needs a person.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import TypeVar

from services.contracts.device import LEASE_RENEWALS, DeviceLease, LeaseRequest
from services.contracts.errors import Cancelled, DeadlineExceeded, DeviceLeased, RatchetError
from services.platform.http import ServiceClient
from services.platform.jobs import JobContext
from services.platform.logs import get_logger
from services.trainer.process import END_SECONDS, TrainingChild
from services.trainer.settings import TrainerSettings

log = get_logger(__name__)

PATH = "/v1/device/lease"
LEND_SECONDS = 600.0
"""Of one asking: the generator answers within its RATCHET_GENERATOR_PUT_WAIT_SECONDS (540), drained and asleep."""
PAUSE_SECONDS = 1.0
"""Between two askings, where the generator does not say when to come again."""
MOST_PAUSE_SECONDS = 5.0
GIVE_BACK_SECONDS = 5.0
GIVE_BACK_TRIES = 3
CLOSE_SECONDS = END_SECONDS + GIVE_BACK_TRIES * (GIVE_BACK_SECONDS + PAUSE_SECONDS)
"""How long a trainer that stops waits for its leases to be given back. Without it they end by themselves."""
HANDLER_WAIT_SECONDS = 1.5
"""How long a job waits for its lease to be given back. Below what a cancelled job's handler is allowed
(`cancel_grace_seconds`) after the end of its process; the giving back goes on without it."""

T = TypeVar("T")


class DeviceLost(RatchetError):
    """The lease could not be kept, so the training process was ended. Its job is tried again, from its last save."""

    status, code, title, retryable = 503, "device-lost", "Device lost", True


class Turn:
    """One job's turn on the device. Without a generator to share with it is never lost."""

    def __init__(self, holder: str = "") -> None:
        self.holder = holder
        self.child: TrainingChild | None = None
        """Set once it runs: the device is not free before it has ended."""
        self.lost = asyncio.Event()
        self.cause = ""
        self.lease_id = ""
        self.until = 0.0
        """On the event loop's clock: until then the generator sleeps for certain."""

    def lose(self, cause: str) -> None:
        """The device may be the generator's from now on."""
        if not self.lost.is_set():
            log.error("device_lost", holder=self.holder, cause=cause)
            self.cause = cause
            self.lost.set()


class SharedDevice:
    """The device that generator and trainer share; a no-op without `trainer_generator_url`."""

    def __init__(self, settings: TrainerSettings, generator: ServiceClient | None = None) -> None:
        self.settings = settings
        self._generator = generator
        if generator is None and settings.trainer_generator_url is not None:
            # waiting is told in the job's progress, so the retries are ours
            self._generator = ServiceClient("generator", settings.trainer_generator_url, settings.token, retry=False)
        self._returns: set[asyncio.Task[None]] = set()
        self._margin = settings.trainer_lease_margin_seconds

    @asynccontextmanager
    async def turn(self, context: JobContext) -> AsyncIterator[Turn]:
        """Hold the device for the job. `Turn.lost` is set when it cannot be held any longer.

        Raises:
            Cancelled: the job was cancelled while it waited.
            DeadlineExceeded: the device was not free in time, or an earlier training process did not end; retryable.
            RatchetError: the generator refused for good, e.g. it does not share its device.
        """
        if self._generator is None:
            yield Turn()
            return
        if self._returns:  # an earlier attempt's giving back would end this lease
            await self._returned(context)
        turn = Turn(f"{socket.gethostname()}-{os.getpid()} for {context.job.id}")
        keeping: asyncio.Task[None] | None = None
        try:
            await self._take(context, turn)
            keeping = asyncio.create_task(self._keep(turn))
            yield turn
        finally:
            returning = asyncio.create_task(self._return(turn, keeping))
            self._returns.add(returning)
            returning.add_done_callback(self._returns.discard)
            await asyncio.wait({returning}, timeout=HANDLER_WAIT_SECONDS)

    async def close(self) -> None:
        """Give back what is held, within bounds, and close the connection."""
        if self._returns:
            _, late = await asyncio.wait(set(self._returns), timeout=CLOSE_SECONDS)
            for returning in late:  # its process does not end, and no longer has anybody who renews its lease
                returning.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        if self._generator is not None:
            await self._generator.close()

    # --- taking

    async def _returned(self, context: JobContext) -> None:
        """Wait until what an earlier attempt held is given back."""
        seconds = self.settings.trainer_lease_wait_seconds
        context.progress(phase="starting", waiting="waiting for the device: an earlier training process still ends")
        _, late = await _unless_ended(context, asyncio.wait(set(self._returns), timeout=seconds))
        if late:
            raise DeadlineExceeded(
                f"an earlier training process did not end within {seconds:g} s (RATCHET_TRAINER_LEASE_WAIT_SECONDS), "
                "and it may still hold the device; training_process_does_not_end in the trainer's log names its pid"
            )
        context.progress(waiting=None)

    async def _take(self, context: JobContext, turn: Turn) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        deadline = started + self.settings.trainer_lease_wait_seconds
        waiting = False
        while True:
            left = deadline - loop.time()
            try:
                lease = await _unless_ended(context, self._ask(turn, min(LEND_SECONDS, max(left, PAUSE_SECONDS))))
            except RatchetError as error:
                if not error.retryable:
                    raise
                pause = min(error.retry_after_seconds or PAUSE_SECONDS, MOST_PAUSE_SECONDS)
                if loop.time() + pause > deadline:
                    raise DeadlineExceeded(
                        f"the device was not free within {self.settings.trainer_lease_wait_seconds:g} s "
                        f"(RATCHET_TRAINER_LEASE_WAIT_SECONDS): {error.detail}"
                    ) from error
                if not waiting:
                    log.info("waiting_for_device", reason=error.detail)
                waiting = True
                context.progress(phase="starting", waiting=f"waiting for the device: {error.detail}")
                await _unless_ended(context, asyncio.sleep(pause))
            else:
                break
        # the generator counted anew when it answered, a network's delay ago; the margin covers that
        turn.lease_id, turn.until = lease.id, loop.time() + self.settings.trainer_lease_seconds
        if waiting:
            context.progress(waiting=None)
        log.info("device_taken", holder=turn.holder, engine=lease.engine, seconds=round(loop.time() - started, 3))

    async def _ask(self, turn: Turn, seconds: float) -> DeviceLease:
        assert self._generator is not None
        body = LeaseRequest(holder=turn.holder, seconds=self.settings.trainer_lease_seconds)
        return await self._generator.call("PUT", PATH, answer=DeviceLease, body=body, timeout_seconds=seconds)

    # --- keeping

    async def _keep(self, turn: Turn) -> None:
        """Renew until cancelled. However else it ends, the device is lost: nobody renews the lease any more."""
        try:
            turn.lose(await self._renew(turn))
        except Exception as error:
            log.exception("lease_keeper_failed", holder=turn.holder)
            turn.lose(f"the lease could not be kept: {type(error).__name__}: {error}")

    async def _renew(self, turn: Turn) -> str:
        """Renew until it is too late to be sure of the device. Returns why."""
        loop, interval = asyncio.get_running_loop(), self.settings.trainer_lease_seconds / LEASE_RENEWALS
        trouble = "this process stood still"
        pause = interval
        while True:
            await asyncio.sleep(pause)
            asked_at = loop.time()
            left = turn.until - self._margin - asked_at
            if left <= 0:
                return f"the lease could not be renewed for {self.settings.trainer_lease_seconds:g} s: {trouble}"
            try:
                lease = await self._ask(turn, min(interval, left))
            except RatchetError as error:
                if not error.retryable or isinstance(error, DeviceLeased):
                    return error.detail
                if trouble != error.detail:
                    log.warning("lease_not_renewed", holder=turn.holder, reason=error.detail)
                trouble = error.detail
                pause = min(PAUSE_SECONDS, max(0.0, turn.until - self._margin - loop.time()))
            else:
                if lease.id != turn.lease_id:
                    # in time, so it has used the device for nothing: it was restarted, and waits before it starts vLLM
                    log.warning("lease_taken_again", holder=turn.holder, reason="the generator was restarted")
                turn.lease_id, turn.until = lease.id, asked_at + self.settings.trainer_lease_seconds
                pause = interval

    # --- giving back

    async def _return(self, turn: Turn, keeping: asyncio.Task[None] | None) -> None:
        try:
            while turn.child is not None and not await turn.child.gone(END_SECONDS):
                log.error(
                    "training_process_does_not_end", holder=turn.holder, child_pid=turn.child.process.pid,
                    then="its lease is lost: vLLM wakes" if turn.lost.is_set() else "its lease is kept until it ends",
                )  # fmt: skip
        finally:
            if keeping is not None:
                keeping.cancel()
                await asyncio.gather(keeping, return_exceptions=True)
        assert self._generator is not None
        problem = ""
        for _ in range(GIVE_BACK_TRIES):
            try:
                await self._generator.send(
                    "DELETE", PATH, params={"holder": turn.holder}, timeout_seconds=GIVE_BACK_SECONDS
                )
            except RatchetError as error:
                problem = error.detail
                if not error.retryable or isinstance(error, DeviceLeased):
                    break
                await asyncio.sleep(PAUSE_SECONDS)
            else:
                return
        log.warning("lease_not_given_back", holder=turn.holder, reason=problem, then="it ends by itself")


async def _unless_ended(context: JobContext, work: Awaitable[T]) -> T:
    """The work's result, unless the job is cancelled or lost first. Raises Cancelled."""
    task = asyncio.ensure_future(work)
    ends = [asyncio.create_task(event.wait()) for event in (context.cancelled, context.lost)]
    try:
        await asyncio.wait({task, *ends}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Cancelled(f"job {context.job.id} was cancelled while it waited for the device")
    finally:
        for each in (task, *ends):
            each.cancel()
        await asyncio.gather(task, *ends, return_exceptions=True)
