"""Who may use the device: vLLM, or the holder of a lease. The books only; `turns` does what they say.

Kept in memory: after a restart nobody knows of a lease, so vLLM is not started before a grace is over in which a holder
renews it. That also holds when disk, container and Redis are new.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Literal

from services.contracts.device import LEASE_RENEWALS, DeviceLease, LeaseRequest
from services.contracts.errors import DeviceLeased, InvalidInput
from services.generator import metrics
from services.generator.settings import GeneratorSettings

RETRY_SECONDS = 5.0
"""What is told to whoever finds the device leased. A training takes seconds to hours."""

Outcome = Literal["granted", "refused", "released", "expired"]


class Lease:
    """One holder's turn, from the asking until the device is taken back."""

    def __init__(self, request: LeaseRequest, now: float) -> None:
        self.id = uuid.uuid4().hex
        self.holder = request.holder
        self.asked_at = now
        self.until = now + request.seconds
        self.engine: Literal["draining", "asleep", "idle", "absent"] = "draining"
        self.given_up = False
        """The holder gave it back before it was granted."""
        self.answered = False
        """The holder was told of it, so it gives it back."""


class Leases:
    """At most one lease at a time, and the grace after a start."""

    def __init__(self, settings: GeneratorSettings) -> None:
        self.held: Lease | None = None
        self._grace_seconds = settings.generator_lease_grace_seconds if settings.generator_sleep else 0.0
        self._grace_until = 0.0
        self._changed = asyncio.Event()

    def begin_grace(self) -> None:
        """The generator starts: somebody may hold a lease that was granted before."""
        self._grace_until = asyncio.get_running_loop().time() + self._grace_seconds

    def check(self, request: LeaseRequest) -> None:
        """Refuse what could not be kept.

        Raises:
            InvalidInput: so long a lease is renewed too seldom to be noticed in the grace after a restart.
            DeviceLeased: somebody else holds it.
        """
        if request.seconds / LEASE_RENEWALS >= self._grace_seconds:
            raise InvalidInput(
                f"a lease of {request.seconds:g} s is renewed every {request.seconds / LEASE_RENEWALS:g} s, and a "
                f"restarted generator waits {self._grace_seconds:g} s for a renewal before it starts vLLM: lower "
                "RATCHET_TRAINER_LEASE_SECONDS, or raise RATCHET_GENERATOR_LEASE_GRACE_SECONDS",
                field="seconds",
            )
        self.check_holder(request.holder)

    def check_holder(self, holder: str) -> None:
        """Raises DeviceLeased when somebody else holds the device."""
        if self.held is not None and self.held.holder != holder:
            raise DeviceLeased(
                f"{self.held.holder} holds the device; a lease that is not renewed ends in {self._left():.0f} s",
                retry_after_seconds=RETRY_SECONDS,
            )

    def take(self, request: LeaseRequest) -> Lease:
        """Book the device for a holder, who gets it once vLLM has given it up."""
        self.held = Lease(request, asyncio.get_running_loop().time())
        return self.held

    def grant(self, lease: Lease, engine: Literal["asleep", "idle", "absent"], seconds: float) -> None:
        """The device is the holder's, for so long from now."""
        lease.engine = engine
        lease.until = asyncio.get_running_loop().time() + seconds
        self._grace_until = 0.0
        metrics.LEASES.labels("granted").inc()
        metrics.ASLEEP.set(1)

    def drop(self, outcome: Outcome) -> None:
        """The lease is over."""
        lease, self.held = self.held, None
        if lease is None:
            return
        metrics.LEASES.labels(outcome).inc()
        metrics.ASLEEP.set(0)
        if outcome != "refused":
            metrics.LEASE_SECONDS.observe(asyncio.get_running_loop().time() - lease.asked_at)
        self._changed.set()
        self._changed = asyncio.Event()

    def view(self) -> DeviceLease | None:
        """The lease as others see it."""
        if (lease := self.held) is None:
            return None
        return DeviceLease(id=lease.id, holder=lease.holder, seconds_left=self._left(), engine=lease.engine)

    def blocked(self) -> str | None:
        """Why vLLM may not use the device now; None when it may."""
        if self.held is not None:
            return f"{self.held.holder} holds the device"
        left = self._grace_until - asyncio.get_running_loop().time()
        if left > 0:
            return (
                f"vLLM is not started for another {left:.0f} s, for somebody may hold the device since before this "
                "generator started (RATCHET_GENERATOR_LEASE_GRACE_SECONDS)"
            )
        return None

    async def free(self, until: float) -> bool:
        """Wait until vLLM may use the device. False when it still may not at this time of the event loop's clock."""
        loop = asyncio.get_running_loop()
        while self.blocked() is not None:
            wake_at = min(until, self._grace_until) if self.held is None else until
            changed = self._changed
            try:
                async with asyncio.timeout_at(wake_at):
                    await changed.wait()
            except TimeoutError:
                if loop.time() >= until:
                    return self.blocked() is None
        return True

    def _left(self) -> float:
        return max(0.0, self.held.until - asyncio.get_running_loop().time()) if self.held else 0.0
