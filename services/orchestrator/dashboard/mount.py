"""Puts the dashboard under `/ui/` of an orchestrator.

NiceGUI has one app per process, and `ui.run_with` may be called once. So it is given a shell once, and every
orchestrator of the process mounts that shell and says in the connection's scope whose pages are asked for.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fastapi import Body, FastAPI, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import MutableHeaders
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import HTTPConnection
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.contracts.errors import RatchetError
from services.contracts.health import ServiceHealth
from services.orchestrator.dashboard import browsers
from services.orchestrator.dashboard.browsers import Browsers, browser_of
from services.orchestrator.dashboard.feed import Feeds
from services.orchestrator.dashboard.health_feed import HealthFeed
from services.orchestrator.dashboard.session import COOKIE, SESSION_SECONDS, Sessions
from services.orchestrator.runs import RunService
from services.orchestrator.settings import OrchestratorSettings
from services.platform.service import problem_of
from services.platform.store import ArtifactStore

if TYPE_CHECKING:
    from nicegui import Client

PATH = "/ui"
ASSETS = Path(__file__).parent / "assets"
RECONNECT_SECONDS = 10.0
"""A page that comes back within it goes on where it was; one that comes later loads itself again."""
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24" fill="none" stroke="{colour}" stroke-width="2.4" '
    'stroke-linecap="round" stroke-linejoin="round"><path d="M3 20h5v-5h5v-5h5V5h3"/></svg>'
)
"""Steps that only go up."""
_SCOPE_KEY = "ratchet.dashboard"
_HEADERS = (
    (b"content-security-policy",
     b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
     b"img-src 'self' data:; font-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
     b"form-action 'self'"),
    (b"referrer-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
)  # fmt: skip
"""Nothing is fetched from elsewhere, and no other site shows the page in a frame to steal a click on a button."""
_VERSIONED = (f"{PATH}/_nicegui/", f"{PATH}/assets/")
_PARTS = (*_VERSIONED, f"{PATH}/_nicegui_ws/", f"{PATH}/session")
"""Not pages: a browser is given its name with a page."""
_FOREVER = b"public, max-age=31536000, immutable"
"""Addresses of assets carry a version."""


@dataclass
class Dashboard:
    """One orchestrator's dashboard. What it shows exists once the orchestrator has started."""

    settings: OrchestratorSettings
    store: ArtifactStore
    app: FastAPI
    sessions: Sessions
    browsers: Browsers
    pages: set[Client] = field(default_factory=set["Client"])

    @property
    def runs(self) -> RunService:
        """What can be asked of runs."""
        return self.app.state.runs

    @property
    def feeds(self) -> Feeds:
        """What pages look at."""
        return self.app.state.dashboard_feeds

    @property
    def health(self) -> HealthFeed:
        """How the services are."""
        return self.app.state.dashboard_health

    @asynccontextmanager
    async def started(self) -> AsyncGenerator[None]:
        """While the orchestrator runs."""

        async def look() -> tuple[ServiceHealth, ...]:
            return await self.app.state.service_health.look()

        self.app.state.dashboard_feeds, self.app.state.dashboard_health = Feeds(self.runs), HealthFeed(look)
        try:
            yield
        finally:
            self.feeds.close()
            self.health.close()
            # A page that comes back to another orchestrator of this process must not find its old self there.
            for client in self.pages.copy():
                client.delete()


def mount_dashboard(app: FastAPI, settings: OrchestratorSettings, store: ArtifactStore) -> None:
    """Serve the dashboard under `/ui/`, and lead there from `/`."""
    dashboard = Dashboard(settings, store, app, Sessions(settings.token), Browsers(settings.token))
    app.state.dashboard = dashboard
    shell = _shell()
    app.mount(PATH, _Mounted(shell, dashboard))
    app.add_api_route("/", lambda: RedirectResponse(f"{PATH}/"), include_in_schema=False)
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(owner: FastAPI) -> AsyncGenerator[None]:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(inner(owner))
            await stack.enter_async_context(_nicegui_running(shell))
            await stack.enter_async_context(dashboard.started())
            yield

    app.router.lifespan_context = lifespan


def dashboard_of(request: Request) -> Dashboard:
    """The dashboard a request to the shell is for."""
    return request.scope[_SCOPE_KEY]


@cache
def _shell() -> FastAPI:
    """NiceGUI with our pages and assets. Made once; importing NiceGUI takes a second."""
    from nicegui import core, ui

    from services.orchestrator.dashboard import pages, sockets

    shell = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    shell.mount("/assets", StaticFiles(directory=ASSETS))
    _add_session_routes(shell)
    pages.register()
    ui.run_with(  # pyright: ignore[reportUnknownMemberType]
        shell, title="Ratchet", favicon=ICON.format(colour="#2563d9"), dark=None, language="en-US", tailwind=False,
        reconnect_timeout=RECONNECT_SECONDS, binding_refresh_interval=None, show_welcome_message=False,
        gzip_middleware_factory=None,
    )  # fmt: skip
    sockets.guard()
    # NiceGUI lets any site connect (`*`); None is engine.io's own rule: the page's host only.
    core.sio.eio.cors_allowed_origins = None  # pyright: ignore[reportUnknownMemberType]
    shell.add_middleware(sockets.OwnSockets)
    return shell


def _add_session_routes(shell: FastAPI) -> None:
    """The browser fetches its cookie itself, for only an answer can set one that no script reads."""

    @shell.post("/session")
    async def begin(request: Request, ticket: Annotated[str, Body(embed=True)]) -> Response:  # pyright: ignore[reportUnusedFunction]
        try:
            session = dashboard_of(request).sessions.redeem(ticket, browser_of(request.scope))
        except RatchetError as error:
            return problem_of(error)
        answer = JSONResponse({"signed_in": True})
        answer.set_cookie(
            COOKIE, session, max_age=int(SESSION_SECONDS), path=PATH, httponly=True, samesite="lax",
            secure=request.url.scheme == "https",
        )  # fmt: skip
        return answer

    @shell.delete("/session")
    async def end(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        dashboard_of(request).sessions.end(Sessions.of(request.cookies))
        answer = JSONResponse({"signed_in": False})
        answer.delete_cookie(COOKIE, path=PATH, httponly=True, samesite="lax")
        return answer


class _Mounted:
    """Marks connections with their dashboard and their browser, adds headers, and counts them under one route."""

    def __init__(self, shell: FastAPI, dashboard: Dashboard) -> None:
        self._app: ASGIApp = GZipMiddleware(shell, minimum_size=1024, compresslevel=5)
        self._dashboard = dashboard
        self._route = Route(PATH, endpoint=_nothing)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[_SCOPE_KEY] = self._dashboard
        known = self._dashboard.browsers
        cookies = HTTPConnection(scope).cookies
        browsers.mark(scope, known.of(cookies))
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = str(scope["path"])
        versioned = path.startswith(_VERSIONED)
        given: str | None = None
        if scope["method"] == "GET" and browser_of(scope) is None and not path.startswith(_PARTS):
            given = known.new()
            browsers.mark(scope, known.of({browsers.COOKIE: given}))

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", []), *_HEADERS]
                if versioned and message["status"] in (200, 304):
                    headers = [(name, value) for name, value in headers if name.lower() != b"cache-control"]
                    headers.append((b"cache-control", _FOREVER))
                message["headers"] = headers
                if given is not None:
                    secure = "; Secure" if scope["scheme"] == "https" else ""
                    cookie = f"{browsers.COOKIE}={given}; HttpOnly; Path={PATH}; SameSite=lax{secure}"
                    MutableHeaders(raw=headers).append("set-cookie", cookie)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            scope["route"] = self._route


async def _nothing(request: Request) -> Response:
    return Response()


class _Running:
    """How many orchestrators of this process use NiceGUI now, and its lifespan."""

    users = 0
    stack: AsyncExitStack | None = None


@asynccontextmanager
async def _nicegui_running(shell: FastAPI) -> AsyncGenerator[None]:
    """NiceGUI's own start and stop: with the first orchestrator of the process, and with the last."""
    if _Running.users == 0:
        _Running.stack = AsyncExitStack()
        await _Running.stack.enter_async_context(shell.router.lifespan_context(shell))
    _Running.users += 1
    try:
        yield
    finally:
        _Running.users -= 1
        if _Running.users == 0 and _Running.stack is not None:
            await _Running.stack.aclose()
            _Running.stack = None
