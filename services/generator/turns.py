"""Taking turns on one device: vLLM falls asleep for the holder of a lease, and wakes when it is given back.

A lease that is not renewed ends by itself, so a trainer that was killed leaves no sleeper. Waking proves the policy
again before the gate opens. Whatever does not sleep or wake is ended and started anew: an ended vLLM holds nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Literal

from services.contracts.checkpoints import PolicyInfo
from services.contracts.device import DeviceLease, LeaseRequest
from services.contracts.errors import Conflict, RatchetError, Unavailable
from services.generator import metrics
from services.generator.engine import EngineDied
from services.generator.leases import RETRY_SECONDS, Lease, Outcome
from services.generator.policy import PolicyServer, State
from services.generator.settings import GeneratorSettings
from services.platform.logs import get_logger

log = get_logger(__name__)


class Turns:
    """Lends the device of a policy server's engine."""

    def __init__(self, settings: GeneratorSettings, policy: PolicyServer) -> None:
        self._settings = settings
        self._policy = policy
        self._leases = policy.leases
        self._before: tuple[State, str | None] = ("empty", None)
        """State and detail that are to come back when nothing was served."""
        self._expiry: asyncio.Task[None] | None = None

    async def lend(self, request: LeaseRequest, gone: Callable[[], Awaitable[bool]]) -> DeviceLease:
        """Give the device to this holder, or renew its lease. Returns once vLLM has given it up.

        Args:
            gone: Whether the asker went away; it then gets no lease, which nobody would give back. One that was made
                for it meanwhile ends, unless the same holder has asked again and has got it.

        Raises:
            Conflict: this generator does not share its device, the asker went away, or the lease was given back before
                it was granted.
            DeviceLeased: somebody else holds it.
            Unavailable: rollouts, or a change of the policy, took too long; ask again.
        """
        if not self._settings.generator_sleep:
            raise Conflict(
                "this generator does not share its device: set RATCHET_GENERATOR_SLEEP=true there, or unset "
                "RATCHET_TRAINER_GENERATOR_URL at the trainer when each has a device of its own"
            )
        policy, leases = self._policy, self._leases
        deadline = asyncio.get_running_loop().time() + self._settings.generator_put_wait_seconds
        ours: Lease | None = None
        while True:
            if await gone():
                if ours is not None and leases.held is ours and not ours.answered:
                    self._give_up(ours)
                raise Conflict("whoever asked for the device went away")
            leases.check(request)
            if policy.changing:
                if not await policy.settled(deadline):
                    raise Unavailable(
                        f"the device is not free yet: {policy.detail or policy.state}; ask again",
                        retry_after_seconds=RETRY_SECONDS,
                    )
            elif (lease := leases.held) is not None:
                lease.until = asyncio.get_running_loop().time() + request.seconds
                lease.answered = True
                view = leases.view()
                assert view is not None
                return view
            else:
                lease = ours = leases.take(request)
                change = policy.begin(self._fall_asleep(lease, request.seconds))
                if await policy.settled(deadline):
                    change.result()
                if lease.given_up:
                    raise Conflict(f"{lease.holder} gave the lease back before it was granted")

    def give_back(self, holder: str) -> PolicyInfo:
        """The holder needs the device no more: vLLM wakes. Harmless when there is no lease.

        Raises:
            DeviceLeased: somebody else holds it.
        """
        leases = self._leases
        leases.check_holder(holder)
        if (lease := leases.held) is not None:
            self._give_up(lease)
        return self._policy.info()

    async def close(self) -> None:
        """Let no lease run out any more."""
        if self._expiry is not None:
            self._expiry.cancel()
            await asyncio.gather(self._expiry, return_exceptions=True)

    def _give_up(self, lease: Lease) -> None:
        if lease.engine == "draining":
            lease.given_up = True
        else:
            self._end(lease, "released")

    # --- falling asleep

    async def _fall_asleep(self, lease: Lease, seconds: float) -> None:
        policy, leases = self._policy, self._leases
        self._before = policy.state, policy.detail
        try:
            if policy.state == "serving":
                await policy.drain_rollouts(f"{lease.holder} takes the device")
        except BaseException:
            leases.drop("refused")
            raise
        if lease.given_up:
            leases.drop("refused")
            if policy.state == "serving":
                policy.serve_again()
            return
        try:
            engine = await self._quiet(lease)
        except BaseException as error:
            leases.drop("refused")
            policy.fail(f"the device could not be given to {lease.holder}: {str(error) or type(error).__name__}")
            raise
        leases.grant(lease, engine, seconds)
        log.info("device_lent", holder=lease.holder, engine=engine)
        if lease.given_up:
            leases.drop("released")
            await self._wake(lease)
        else:
            self._expiry = asyncio.create_task(self._expire(lease))

    async def _quiet(self, lease: Lease) -> Literal["asleep", "idle", "absent"]:
        """Nothing in flight, vLLM asleep; or ended when it cannot sleep, for the device was promised."""
        policy, served = self._policy, self._policy.state == "serving"
        policy.state, policy.detail = "asleep", f"{lease.holder} holds the device"
        metrics.READY.set(0)
        told = f"asleep: {policy.detail}"
        if served:
            policy.gate.close(told)
            await policy.drain()
        else:
            policy.gate.shut(told)
        engine = policy.engine
        if engine is not None and served and not engine.died.is_set():
            try:
                await engine.client.sleep()
            except RatchetError as error:
                log.error("sleep_failed", reason=error.detail, then="vLLM is ended, and starts when the lease is over")
            else:
                if policy.description is not None and policy.description.sleep_mode:
                    return "asleep"
                log.warning("sleep_frees_no_memory", reason="this vLLM has no sleep mode; it only pauses")
                return "idle"
        await policy.stop_engine()
        return "absent"

    # --- waking

    async def _expire(self, lease: Lease) -> None:
        loop = asyncio.get_running_loop()
        while (left := lease.until - loop.time()) > 0:  # noqa: ASYNC110 - each renewal moves the end
            await asyncio.sleep(left)
        log.warning("lease_expired", holder=lease.holder, then="vLLM wakes")
        self._end(lease, "expired")

    def _end(self, lease: Lease, outcome: Outcome) -> None:
        if self._leases.held is not lease:
            return
        if outcome == "released" and self._expiry is not None:
            self._expiry.cancel()
        self._leases.drop(outcome)
        self._policy.state, self._policy.detail = "waking", f"{lease.holder} had the device"
        self._policy.begin(self._wake(lease))

    async def _wake(self, lease: Lease) -> None:
        policy, loop = self._policy, asyncio.get_running_loop()
        state, detail = self._before
        if state != "serving":
            policy.state, policy.detail = state, detail
            policy.shut_unserved()
            return
        started = loop.time()
        policy.state, policy.detail = "waking", f"{lease.holder} had the device"
        policy.gate.close(f"waking: {policy.detail}")
        try:
            await self._wake_proven()
        except RatchetError as error:
            log.error("wake_failed", reason=error.detail)
            await policy.restart(f"waking after {lease.holder}'s turn failed: {error.detail}")
        else:
            policy.serve_again()
        seconds = loop.time() - started
        metrics.WAKE_SECONDS.observe(seconds)
        log.info("device_back", holder=lease.holder, seconds=seconds, state=policy.state)

    async def _wake_proven(self) -> None:
        policy = self._policy
        engine = policy.engine
        if engine is None:
            raise EngineDied("vLLM could not sleep and was ended")
        if engine.died.is_set():
            raise EngineDied(f"vLLM ended while it slept; the last lines of its log:\n{engine.tail()}")
        await engine.client.wake_up()
        await engine.client.reset_prefix_cache()
        await policy.prove_current()
