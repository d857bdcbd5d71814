"""A page's connection belongs to the browser the page was made for, whoever else knows the page's ids."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from nicegui import Client
from playwright.sync_api import expect
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from services.orchestrator.dashboard import browsers, session
from services.orchestrator.dashboard.actions import RunActions
from services.platform.logs import configure_logging
from tests.browser.conftest import Open
from tests.fixtures.dashboard import DashboardServer
from tests.fixtures.logs import JsonLogs, json_logs
from tests.fixtures.orchestrator_stack import TOKEN

__all__ = ["json_logs"]  # the fixture
TAB = "the-tab-of-the-victim"
SECONDS = 10.0
ADDRESS = "/ui/_nicegui_ws/socket.io/"
Connect = Callable[..., "Socket"]


class Socket:
    """A page's connection as a program makes it: Socket.IO over one WebSocket."""

    def __init__(self, server: DashboardServer, cookies: str, query: dict[str, str]) -> None:
        url = f"ws://127.0.0.1:{server.port}{ADDRESS}?" + urlencode({"EIO": "4", "transport": "websocket", **query})
        headers = {"Cookie": cookies} if cookies else {}
        self._open = ExitStack()
        self._connection = self._open.enter_context(connect(url, additional_headers=headers, proxy=None))
        self.transport: str = json.loads(self._read("0")[1:])["sid"]
        self._connection.send("40")
        self.answer = self._read("4")
        self.accepted = self.answer.startswith("40")

    def emit(self, *message: object) -> None:
        """Send a message."""
        self._connection.send("42" + json.dumps(message))

    def ask(self, *message: object) -> Any:
        """Send a message and wait for its answer."""
        self._connection.send("427" + json.dumps(message))
        return json.loads(self._read("437")[3:])[0]

    def close(self) -> None:
        """Leave."""
        self._open.close()

    def _read(self, start: str) -> str:
        while True:
            message = str(self._connection.recv(timeout=SECONDS))
            if message == "2":
                self._connection.send("3")
            elif message.startswith(start):
                return message


class Victim:
    """Somebody signed in, in front of a run's page."""

    def __init__(self, server: DashboardServer) -> None:
        dashboard = server.stack.app.state.dashboard
        browser = dashboard.browsers.new()
        signed_in = dashboard.sessions.sign_in(TOKEN, dashboard.browsers.of({browsers.COOKIE: browser}))
        self.cookies = f"{browsers.COOKIE}={browser}; {session.COOKIE}={signed_in}"
        page = httpx.get(server.url + "/ui/runs/r", headers={"Cookie": self.cookies})
        self.id = re.search(r"client_id\W+([0-9a-f-]{36})", page.text)[1]  # type: ignore[index]
        self.ids = {"client_id": self.id, "tab_id": TAB}
        self.handshake = {**self.ids, "document_id": "d", "old_tab_id": None, "next_message_id": None}
        pause = next(
            one for one in Client.instances[self.id].elements.values() if one.props.get("data-action") == "pause"
        )
        listener = next(iter(pause._event_listeners))
        self.click = {"client_id": self.id, "id": pause.id, "listener_id": listener, "args": []}


@pytest.fixture
def clicks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs whose pause button was pressed."""
    pressed: list[str] = []
    monkeypatch.setattr(RunActions, "pause", lambda self: pressed.append(self.run))
    return pressed


@pytest.fixture
def victim(server: DashboardServer, clicks: list[str]) -> Victim:
    server.hold()
    server.call(server.stack.start("r"))
    server.call(server.stack.status("running"))
    return Victim(server)


@pytest.fixture
def sockets(server: DashboardServer, victim: Victim) -> Iterator[Connect]:
    made: list[Socket] = []

    def one(cookies: str, **query: str) -> Socket:
        made.append(Socket(server, cookies, query))
        return made[-1]

    yield one
    for socket in made:
        socket.close()
    server.go_on()


def another_browser(server: DashboardServer) -> str:
    return f"{browsers.COOKIE}={server.stack.app.state.dashboard.browsers.new()}"


def test_the_browser_of_the_page_connects_clicks_and_comes_back(
    victim: Victim, sockets: Connect, clicks: list[str]
) -> None:
    for times in (1, 2):
        socket = sockets(victim.cookies, client_id=victim.id)
        assert socket.ask("handshake", victim.handshake) is True
        socket.emit("event", victim.click)
        assert socket.ask("handshake", victim.handshake) is False  # once per socket; told after the click
        assert clicks == ["r"] * times
        socket.close()


def test_without_a_cookie_there_is_no_connection_whatever_ids_are_known(
    server: DashboardServer, victim: Victim, sockets: Connect
) -> None:
    assert sockets(victim.cookies, client_id=victim.id).ask("handshake", victim.handshake) is True
    for query in ({}, victim.ids, {**victim.handshake, "implicit_handshake": "true"}):
        with pytest.raises(InvalidStatus) as refused:
            sockets("", **query)
        assert refused.value.response.status_code == 403
        polled = httpx.get(server.url + ADDRESS, params={"EIO": "4", "transport": "polling", **query})
        assert polled.status_code == 403


@pytest.mark.parametrize("forged", [False, True])
def test_another_browser_joins_no_page_and_presses_none_of_its_buttons(
    server: DashboardServer, victim: Victim, sockets: Connect, clicks: list[str], forged: bool
) -> None:
    owner = sockets(victim.cookies, client_id=victim.id)
    assert owner.ask("handshake", victim.handshake) is True
    cookies = f"{browsers.COOKIE}=made.up" if forged else another_browser(server)
    for query in (victim.ids, {**victim.handshake, "implicit_handshake": "true"}):
        assert not sockets(cookies, **query).accepted
    thief = sockets(cookies)  # names no page, so nothing is wrong yet
    assert thief.accepted
    thief.emit("event", victim.click)
    assert thief.ask("handshake", victim.handshake) is False
    thief.emit("event", victim.click)
    assert thief.ask("handshake", victim.handshake) is False
    assert clicks == []


def test_another_browser_reads_and_writes_nothing_on_a_known_transport(
    server: DashboardServer, victim: Victim, sockets: Connect
) -> None:
    with httpx.Client(base_url=server.url, headers={"Cookie": victim.cookies}) as owner:
        opened = owner.get(ADDRESS, params={"EIO": "4", "transport": "polling", "client_id": victim.id})
        known = {"EIO": "4", "transport": "polling", "sid": json.loads(opened.text[1:])["sid"]}
        for cookies in ("", another_browser(server)):
            headers = {"Cookie": cookies} if cookies else {}
            with httpx.Client(base_url=server.url, headers=headers) as thief:
                assert thief.post(ADDRESS, params=known, content="40").status_code == 403
                assert thief.get(ADDRESS, params=known).status_code == 403
            with pytest.raises(InvalidStatus):
                sockets(cookies, **{**known, "transport": "websocket"})
        assert owner.post(ADDRESS, params=known, content="40").status_code == 200
        assert owner.get(ADDRESS, params=known).text.startswith("40")


def test_a_page_comes_back_after_its_connection_broke_and_after_its_cookie_was_changed(
    server: DashboardServer, open_page: Open
) -> None:
    server.call(server.stack.start("r", iterations=0))
    page = open_page("/ui/").page
    toggle = page.locator('[data-action="theme"]')
    expect(toggle).to_have_attribute("title", "Colours: auto")
    page.wait_for_function("window.did_handshake")
    page.evaluate("window.notReloaded = true; window.before = window.socket.id; window.socket.io.engine.close()")
    page.wait_for_function("window.socket.connected && window.socket.id !== window.before")
    toggle.click()
    expect(toggle).to_have_attribute("title", "Colours: light")
    assert page.evaluate("window.notReloaded === true")
    assert not [one for one in page.context.cookies() if one.get("name") == browsers.COOKIE and not one.get("httpOnly")]
    # As after a change of the token: nothing that is signed holds, and the page gets itself anew.
    page.context.add_cookies([{"name": browsers.COOKIE, "value": "made.up", "domain": "127.0.0.1", "path": "/ui"}])
    page.evaluate("window.socket.io.engine.close()")
    page.wait_for_function("window.notReloaded !== true && window.did_handshake")
    toggle.click()
    expect(toggle).to_have_attribute("title", "Colours: dark")


def test_the_log_names_no_page(
    server: DashboardServer, open_page: Open, json_logs: JsonLogs, caplog: pytest.LogCaptureFixture
) -> None:
    configure_logging("test")
    told = logging.getLogger("uvicorn.error")
    level = told.level
    told.addHandler(caplog.handler)
    told.setLevel(logging.INFO)
    try:
        page = open_page("/ui/").page
        page.wait_for_function("window.did_handshake")
        page_id: str = page.evaluate("window.clientId")
    finally:
        told.removeHandler(caplog.handler)
        told.setLevel(level)
    assert re.search(r'"WebSocket /\S*socket\.io/" \[accepted\]', caplog.text)
    for text in (caplog.text, json.dumps(json_logs.lines())):
        assert page_id not in text
        assert "client_id" not in text
        assert "tab_id" not in text
