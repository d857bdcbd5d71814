"""The gate in front of the engine: it counts requests in flight and holds new ones back while the policy changes.

Two kinds of requests pass it: `outside` (the OpenAI routes) and `rollouts`. It has one of three positions:

- open: both pass (on trial with `trial_traffic="wait"`: rollouts only, outside requests wait);
- closed: a swap is under way, both wait;
- shut: nothing is served and nothing will be soon; both are refused at once with the reason.

Whoever passes gets a ticket that names the policy version; it holds the engine at that version until it is left. No
lock is needed: everything here runs in one event loop and nothing awaits between looking and changing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Literal

from services.contracts.errors import Overloaded, Unavailable
from services.generator import metrics

Traffic = Literal["outside", "rollouts"]
RETRY_SECONDS = 5.0
"""What a refused caller is told to wait. A swap takes under two seconds, a restart of the engine a minute."""


class Ticket:
    """A request in flight. `interrupted` asks it to stop; a request that has sent nothing is then sent again."""

    def __init__(self, traffic: Traffic, version: str) -> None:
        self.traffic: Traffic = traffic
        self.version = version
        self.committed = False
        """Part of the answer has gone to the caller, so the request cannot be sent to another policy any more."""
        self.interrupted = asyncio.Event()


class Gate:
    """See the module's docstring.

    Args:
        wait_seconds: Longest wait for a closed gate.
        trial_wait_seconds: Longest wait of an outside request for a trial's end.
        max_outside, max_rollouts: Requests waiting and running; above it they are refused with 429.
    """

    def __init__(self, *, wait_seconds: float, trial_wait_seconds: float, max_outside: int, max_rollouts: int) -> None:
        self._wait_seconds = wait_seconds
        self._trial_wait_seconds = trial_wait_seconds
        self._most: dict[Traffic, int] = {"outside": max_outside, "rollouts": max_rollouts}
        self._admitted: dict[Traffic, int] = {"outside": 0, "rollouts": 0}
        self._tickets: set[Ticket] = set()
        self._version: str | None = None
        self._held: frozenset[Traffic] = frozenset()
        self._shut: str | None = "no policy is loaded; load one with PUT /v1/policy"
        self._changed = asyncio.Event()
        self._why = ""

    # --- positions

    def open(self, version: str, *, hold_outside: bool = False) -> None:
        """Let requests through to this version; on a trial outside requests go on waiting."""
        self._version, self._shut = version, None
        self._held = frozenset({"outside"} if hold_outside else ())
        self._why = f"policy {version} is on trial"
        self._notify()

    def close(self, why: str, *traffic: Traffic) -> None:
        """New requests wait (all kinds by default), besides those that wait already. Those in flight go on."""
        self._held |= frozenset(traffic or ("outside", "rollouts"))
        self._why = why
        self._notify()

    def shut(self, reason: str) -> None:
        """Refuse requests, also the waiting ones, with this reason."""
        self._version, self._shut = None, reason
        self._notify()

    # --- passing

    @asynccontextmanager
    async def admitted(self, traffic: Traffic) -> AsyncIterator[None]:
        """Around a whole request, waiting included. Raises Overloaded when there are too many of its kind."""
        if self._admitted[traffic] >= self._most[traffic]:
            metrics.REFUSED.labels(traffic, "too_many").inc()
            raise Overloaded(
                f"{self._admitted[traffic]} {traffic} requests are waiting or running, which is the limit "
                f"(RATCHET_GENERATOR_MAX_{'OUTSIDE' if traffic == 'outside' else 'ROLLOUT'}_REQUESTS); try again later",
                retry_after_seconds=RETRY_SECONDS,
            )
        self._admitted[traffic] += 1
        try:
            yield
        finally:
            self._admitted[traffic] -= 1

    async def enter(self, traffic: Traffic) -> Ticket:
        """Wait until the gate lets this kind through. Give the ticket back with `leave`.

        Raises:
            Unavailable: the gate is shut, or did not open in time; the message says why.
        """
        if self._shut is None and traffic in self._held:
            with metrics.WAITING.labels(traffic).track_inprogress(), metrics.GATE_WAIT_SECONDS.labels(traffic).time():
                return await self._pass(traffic)
        return await self._pass(traffic)

    async def _pass(self, traffic: Traffic) -> Ticket:
        loop = asyncio.get_running_loop()
        started = loop.time()
        while True:
            if self._shut is not None:
                metrics.REFUSED.labels(traffic, "shut").inc()
                raise Unavailable(self._shut, retry_after_seconds=RETRY_SECONDS)
            if traffic not in self._held:
                assert self._version is not None
                ticket = Ticket(traffic, self._version)
                self._tickets.add(ticket)
                return ticket
            on_trial = "rollouts" not in self._held
            limit = self._trial_wait_seconds if on_trial else self._wait_seconds
            changed = self._changed
            try:
                async with asyncio.timeout_at(started + limit):
                    await changed.wait()
            except TimeoutError:
                metrics.REFUSED.labels(traffic, "timeout").inc()
                raise Unavailable(
                    f"{self._why}; this request waited {limit:g} s for it to end", retry_after_seconds=RETRY_SECONDS
                ) from None

    def leave(self, ticket: Ticket) -> None:
        """The request is over. Leaving twice is harmless."""
        self._tickets.discard(ticket)
        self._notify()

    # --- draining

    def in_flight(self, *traffic: Traffic) -> list[Ticket]:
        """Tickets not left yet, of these kinds (default: all)."""
        return [ticket for ticket in self._tickets if not traffic or ticket.traffic in traffic]

    async def drain(self, seconds: float, *traffic: Traffic) -> bool:
        """Wait until none of these kinds is in flight. False when it took longer than `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                while self.in_flight(*traffic):
                    changed = self._changed
                    await changed.wait()
        except TimeoutError:
            return not self.in_flight(*traffic)
        return True

    @staticmethod
    def interrupt(tickets: Iterable[Ticket]) -> None:
        """Ask requests to stop: uncommitted ones are sent again, begun streams end with an error."""
        for ticket in tickets:
            ticket.interrupted.set()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
