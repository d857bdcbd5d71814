"""Keeps a page's connection to the browser the page was made for.

NiceGUI takes who knows a page's ids for the page: any socket that names them is sent what the page is sent, and an
event is taken from a socket that never joined the page. The ids are no secret (they stand in the address of every
connection), so here the cookie that no script reads is asked for as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import parse_qs

from nicegui import Client, core
from socketio.exceptions import ConnectionRefusedError  # pyright: ignore[reportMissingTypeStubs]
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from services.orchestrator.dashboard.browsers import COOKIE, browser_of
from services.platform.logs import get_logger

log = get_logger(__name__)

PATH = "/ui/_nicegui_ws/"
REFUSED = "Implicit handshake failed"
"""The words on which NiceGUI's script loads the page anew, and so gets one of its own."""
Handler = Callable[..., Any]


def _sio() -> Any:
    return core.sio  # python-socketio has no types


class OwnSockets:
    """Refuses connections without a browser's cookie, and requests to another browser's transport."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what may pass."""
        if scope["type"] not in ("http", "websocket") or not str(scope["path"]).startswith(PATH):
            await self._app(scope, receive, send)
            return
        browser = browser_of(scope)
        transport = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("sid", [None])[0]
        if transport is None:
            # A cookie of before the token was changed passes: no page is its own, so the page loads itself anew. Who
            # keeps no cookies must not pass, or that would go on for ever.
            passes = COOKIE in HTTPConnection(scope).cookies
        else:
            environ = _sio().environ.get(transport)
            passes = environ is None or (browser is not None and browser == browser_of(environ["asgi.scope"]))
        if passes:
            await self._app(scope, receive, send)
            return
        log.warning("dashboard_connection_refused", cookie=browser is not None, transport=scope["type"])
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "another browser's page"})
            return
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"this connection belongs to another browser"})


def guard() -> None:
    """Put the check before each of NiceGUI's handlers. Once per process, when NiceGUI is there."""
    handlers: dict[str, Handler] = _sio().handlers["/"]
    # Were NiceGUI to take its messages otherwise, nothing would be guarded: better no dashboard than that.
    missing = {"connect", "handshake", "event", "disconnect"} - handlers.keys()
    if missing:
        raise RuntimeError(f"this NiceGUI has no handlers {sorted(missing)}; the dashboard cannot guard its pages")
    for event, handler in tuple(handlers.items()):
        if event == "connect":
            handlers[event] = _guarded_connect(handler)
        elif event == "handshake":
            handlers[event] = _guarded_handshake(handler)
        elif event != "disconnect":
            handlers[event] = _guarded_message(event, handler)


def _owns(sid: str, page: object) -> bool:
    """Whether a socket and a page are of one browser. Of a page that is gone NiceGUI says so itself."""
    client = Client.instances.get(str(page))
    if client is None:
        return True
    browser = browser_of(_sio().get_environ(sid)["asgi.scope"])
    owned = browser is not None and browser == browser_of(client.request.scope)
    if not owned:
        log.warning("dashboard_socket_refused", page=client.request.scope.get("path"))
    return owned


def _guarded_connect(handler: Handler) -> Handler:
    async def connect(sid: str, environ: dict[str, Any], auth: object = None) -> None:
        page = parse_qs(environ.get("QUERY_STRING", "")).get("client_id", [None])[0]
        if page is not None and not _owns(sid, page):
            raise ConnectionRefusedError(REFUSED)
        await handler(sid, environ, auth)

    return connect


def _guarded_handshake(handler: Callable[..., Awaitable[bool]]) -> Handler:
    async def handshake(sid: str, message: Mapping[str, Any]) -> bool:
        return _owns(sid, message.get("client_id")) and await handler(sid, message)

    return handshake


def _guarded_message(event: str, handler: Handler) -> Handler:
    async def taken(sid: str, message: Mapping[str, Any]) -> None:
        # The handshake put the socket in a room named after its page.
        if message.get("client_id") not in _sio().rooms(sid):
            log.warning("dashboard_message_refused", message=event)
            return
        answer = handler(sid, message)
        if inspect.isawaitable(answer):
            await answer

    return taken
