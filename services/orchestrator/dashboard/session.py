"""Who may control: the stack's token once, then a signed cookie. Checked on the server before every action."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Mapping

from pydantic import SecretStr

from services.contracts.errors import Overloaded, Unauthorized

COOKIE = "ratchet_session"
SESSION_SECONDS = 12 * 3600.0
"""A working day; then the token is asked for again."""
TICKET_SECONDS = 30.0
"""Between the right token over the page's connection and the browser's request for its cookie."""
WRONG_TOKENS = 5
"""Wrong tokens of one address within a window before it has to wait."""
WINDOW_SECONDS = 60.0
ADDRESSES_KEPT = 1000
"""Bounds the memory of the throttle; the oldest address is forgotten first."""


class Throttle:
    """Wrong tokens by address, over a sliding window."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wrong: dict[str, list[float]] = {}

    def check(self, address: str) -> None:
        """Raises Overloaded while the address has to wait."""
        recent = self._recent(address)
        if len(recent) >= WRONG_TOKENS:
            wait = WINDOW_SECONDS - (self._clock() - recent[-WRONG_TOKENS])
            raise Overloaded(
                f"{WRONG_TOKENS} wrong tokens within {WINDOW_SECONDS:g} s; try again in {max(1.0, wait):.0f} s",
                field="token", retry_after_seconds=wait,
            )  # fmt: skip

    def wrong(self, address: str) -> None:
        """Count a wrong token."""
        recent = self._recent(address)
        self._wrong.pop(address, None)
        self._wrong[address] = [*recent, self._clock()]
        while len(self._wrong) > ADDRESSES_KEPT:
            self._wrong.pop(next(iter(self._wrong)))

    def _recent(self, address: str) -> list[float]:
        return [at for at in self._wrong.get(address, ()) if self._clock() - at < WINDOW_SECONDS]


class Sessions:
    """Signed-in sessions: `id.expiry.signature`, signed with a key that is derived from the token.

    So a session outlives a restart of the orchestrator, and a new token ends them all.
    """

    def __init__(self, token: SecretStr, clock: Callable[[], float] = time.time) -> None:
        self._token = token
        self._clock = clock
        self._key = hmac.digest(token.get_secret_value().encode(), b"ratchet dashboard session", hashlib.sha256)
        self._tickets: dict[str, tuple[str, float]] = {}
        self._ended: dict[str, float] = {}
        self.throttle = Throttle()

    def sign_in(self, given: str, address: str) -> str:
        """A new session for the right token.

        Raises:
            Unauthorized: it is another token.
            Overloaded: too many wrong ones came from this address.
        """
        self.throttle.check(address)
        expected = self._token.get_secret_value().encode()
        if not hmac.compare_digest(given.strip().encode(), expected):
            self.throttle.wrong(address)
            raise Unauthorized(
                "this is not the stack's token; it is RATCHET_TOKEN of the services ('ratchet up' keeps it in "
                ".ratchet/token)",
                field="token",
            )
        body = f"{secrets.token_urlsafe(16)}.{self._clock() + SESSION_SECONDS:.0f}"
        return f"{body}.{self._signature(body)}"

    def valid(self, session: str | None) -> bool:
        """Whether the session was signed by us, has not expired and was not ended."""
        body, dot, signature = (session or "").rpartition(".")
        if not dot or not hmac.compare_digest(signature.encode(), self._signature(body).encode()):
            return False
        return float(body.rpartition(".")[2]) > self._clock() and body not in self._ended

    def end(self, session: str | None) -> None:
        """Sign out: the session is worth nothing from now on, wherever its cookie still is."""
        if session is not None and self.valid(session):
            now = self._clock()
            self._ended = {body: until for body, until in self._ended.items() if until > now}
            body = session.rpartition(".")[0]
            self._ended[body] = float(body.rpartition(".")[2])

    def ticket(self, session: str) -> str:
        """Names the session once, so that the browser can fetch it as a cookie that no script reads."""
        now = self._clock()
        self._tickets = {name: kept for name, kept in self._tickets.items() if kept[1] > now}
        name = secrets.token_urlsafe(24)
        self._tickets[name] = (session, now + TICKET_SECONDS)
        return name

    def redeem(self, ticket: str) -> str:
        """The session a ticket names, once. Raises Unauthorized."""
        session, until = self._tickets.pop(ticket, ("", 0.0))
        if until <= self._clock():
            raise Unauthorized("the sign-in took too long; sign in again", field="ticket")
        return session

    @staticmethod
    def of(cookies: Mapping[str, str]) -> str | None:
        """The session a request carries, as yet unchecked."""
        return cookies.get(COOKIE)

    def _signature(self, body: str) -> str:
        return hmac.new(self._key, body.encode(), hashlib.sha256).hexdigest()
