"""Who may control: the stack's token once, then a signed cookie. Checked on the server before every action."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Mapping, Sequence

from pydantic import SecretStr

from services.contracts.errors import Overloaded, Unauthorized
from services.platform.auth import TOKEN_PLACE

COOKIE = "ratchet_session"
SESSION_SECONDS = 12 * 3600.0
"""A working day; then the token is asked for again."""
TICKET_SECONDS = 30.0
"""Between the right token over the page's connection and the browser's request for its cookie."""
WRONG_TOKENS = 5
"""Wrong tokens of one browser within a window before it has to wait."""
WRONG_TOKENS_OF_ALL = 300
"""A browser without its cookie is a new one, so all of them together are bounded too; a token takes longer to guess."""
WINDOW_SECONDS = 60.0
BROWSERS_KEPT = 1000
"""Bounds the memory of the throttle; the oldest browser is forgotten first."""


class Throttle:
    """Wrong tokens by browser and of all, over a sliding window.

    Not by address: behind a container's bridge or a proxy everybody has the same.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wrong: dict[str, list[float]] = {}
        self._of_all: list[float] = []

    def check(self, browser: str) -> None:
        """Raises Overloaded while the browser has to wait."""
        self._check(self._recent(self._wrong.get(browser, ())), WRONG_TOKENS, "from this browser")
        self._check(self._recent(self._of_all), WRONG_TOKENS_OF_ALL, "from all browsers")

    def wrong(self, browser: str) -> None:
        """Count a wrong token."""
        now = self._clock()
        self._of_all = [*self._recent(self._of_all), now][-WRONG_TOKENS_OF_ALL:]
        self._wrong[browser] = [*self._recent(self._wrong.pop(browser, ())), now]
        while len(self._wrong) > BROWSERS_KEPT:
            self._wrong.pop(next(iter(self._wrong)))

    def _check(self, recent: list[float], most: int, whose: str) -> None:
        if len(recent) >= most:
            wait = WINDOW_SECONDS - (self._clock() - recent[-most])
            raise Overloaded(
                f"{most} wrong tokens {whose} within {WINDOW_SECONDS:g} s; try again in {max(1.0, wait):.0f} s",
                field="token", retry_after_seconds=wait,
            )  # fmt: skip

    def _recent(self, times: Sequence[float]) -> list[float]:
        return [at for at in times if self._clock() - at < WINDOW_SECONDS]


class Sessions:
    """Signed-in sessions: `id.expiry.signature`, signed with a key of this process and of the token.

    So a restart of the orchestrator ends them all, and a session that was signed out cannot come back with it.
    """

    def __init__(self, token: SecretStr, clock: Callable[[], float] = time.time) -> None:
        self._token = token
        self._clock = clock
        self._key = hmac.digest(token.get_secret_value().encode(), secrets.token_bytes(32), hashlib.sha256)
        self._tickets: dict[str, tuple[str, str, float]] = {}
        self._ended: dict[str, float] = {}
        self.throttle = Throttle()

    def sign_in(self, given: str, browser: str) -> str:
        """A new session for the right token.

        Raises:
            Unauthorized: it is another token.
            Overloaded: too many wrong ones came from this browser, or from all.
        """
        self.throttle.check(browser)
        expected = self._token.get_secret_value().encode()
        if not hmac.compare_digest(given.strip().encode(), expected):
            self.throttle.wrong(browser)
            raise Unauthorized(
                f"this is not the stack's token; it is {TOKEN_PLACE}",
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

    def ticket(self, session: str, browser: str) -> str:
        """Names the session once, so that the browser can fetch it as a cookie that no script reads. No other can."""
        now = self._clock()
        self._tickets = {name: kept for name, kept in self._tickets.items() if kept[2] > now}
        name = secrets.token_urlsafe(24)
        self._tickets[name] = (session, browser, now + TICKET_SECONDS)
        return name

    def redeem(self, ticket: str, browser: str | None) -> str:
        """The session a ticket names, once, for the browser it was made for. Raises Unauthorized."""
        session, owner, until = self._tickets.pop(ticket, ("", "", 0.0))
        if until <= self._clock():
            raise Unauthorized("the sign-in took too long; sign in again", field="ticket")
        if browser is None or browser != owner:
            raise Unauthorized("this sign-in belongs to another browser; sign in again", field="ticket")
        return session

    @staticmethod
    def of(cookies: Mapping[str, str]) -> str | None:
        """The session a request carries, as yet unchecked."""
        return cookies.get(COOKIE)

    def _signature(self, body: str) -> str:
        return hmac.new(self._key, body.encode(), hashlib.sha256).hexdigest()
