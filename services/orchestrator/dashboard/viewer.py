"""One open page: who looks, from where, and what is told to them."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from functools import cache

from fastapi import Request
from nicegui import Client, ui

from services.contracts.errors import RatchetError, Unauthorized
from services.orchestrator.dashboard.browsers import browser_of
from services.orchestrator.dashboard.feed import Feed
from services.orchestrator.dashboard.mount import ASSETS, Dashboard, dashboard_of
from services.orchestrator.dashboard.session import Sessions
from services.platform.logs import get_logger

log = get_logger(__name__)

NOTE_MILLISECONDS = 6000


class Viewer:
    """The person in front of one page.

    Attributes:
        stale: Shows why what is shown is not up to date; None: it is.
    """

    def __init__(self, request: Request) -> None:
        self.dashboard: Dashboard = dashboard_of(request)
        self.client: Client = ui.context.client
        self.dashboard.pages.add(self.client)
        self.client.on_delete(lambda: self.dashboard.pages.discard(self.client))  # pyright: ignore[reportUnknownMemberType]
        self.theme = request.cookies.get("ratchet_theme", "auto")
        self._browser = browser_of(request.scope) or ""
        self._session = Sessions.of(request.cookies)
        self.stale: Callable[[RatchetError | None], None] = lambda _: None
        self._on_sign_in: list[Callable[[], None]] = []

    def on_sign_in(self, show: Callable[[], None]) -> None:
        """Call `show` when this page has signed in."""
        self._on_sign_in.append(show)

    @property
    def signed_in(self) -> bool:
        """Whether this page may control, as of now."""
        return self.dashboard.sessions.valid(self._session)

    def require_control(self) -> None:
        """Raises Unauthorized unless signed in. Every action begins with it, whatever buttons are shown."""
        if not self.signed_in:
            raise Unauthorized("sign in with the stack's token first", field="token")

    def sign_in(self, token: str) -> None:
        """Check the token and have the browser fetch its cookie. Raises Unauthorized, Overloaded."""
        sessions = self.dashboard.sessions
        self._session = sessions.sign_in(token, self._browser)
        log.info("dashboard_sign_in", address=self.client.ip)
        ticket = sessions.ticket(self._session, self._browser)
        self.client.run_javascript(
            f"""fetch("/ui/session", {{method: "POST", headers: {{"Content-Type": "application/json"}},
            body: JSON.stringify({{ticket: "{ticket}"}})}})"""
        )
        for show in self._on_sign_in:
            show()

    def sign_out(self) -> None:
        """End the session, in all its pages, and forget the cookie."""
        self.dashboard.sessions.end(self._session)
        self._session = None
        self.client.run_javascript(
            'fetch("/ui/session", {method: "DELETE"}).then((answer) => answer.text()).then(() => location.reload())'
        )

    def watch(self, feed: Feed, update: Callable[[], None]) -> None:
        """Call `update` after every refresh of the feed, as long as the page is open."""

        def refresh() -> None:
            if not self.client.is_deleted:
                with self.client:
                    self.stale(feed.error)
                    try:
                        update()
                    except Exception as error:
                        self.stale(
                            RatchetError(
                                f"This page cannot show what there is now: {error!r}. Load it anew; the log says more."
                            )
                        )
                        raise  # the feed logs it, and goes on without this page

        self.client.on_delete(feed.subscribe(refresh))  # pyright: ignore[reportUnknownMemberType]

    def tell(self, text: str, *, good: bool = True) -> None:
        """A note at the edge of the page, read out by screen readers."""
        with self.client:
            ui.notify(
                text, type="positive" if good else "negative", position="bottom-right", multi_line=True,
                timeout=NOTE_MILLISECONDS if good else 0, close_button="Close",
            )  # fmt: skip

    async def attempt(self, action: Callable[[], Awaitable[str]]) -> bool:
        """Do something that needs the token; tell its result, or what was wrong. Returns whether it was done."""
        try:
            self.require_control()
            self.tell(await action())
        except RatchetError as error:
            self.tell(f"{error.title}: {error.detail}", good=False)
            return False
        return True


@cache
def asset(name: str) -> str:
    """Address of one of our assets, with its version."""
    digest = hashlib.sha256((ASSETS / name).read_bytes()).hexdigest()[:12]
    return f"/ui/assets/{name}?v={digest}"
