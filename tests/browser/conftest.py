"""One Chromium with one cache for the session; a server and a store for each test, always on the same port."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import BrowserContext

from ratchet.local.redis_server import RedisServer
from services.platform.service import free_port
from tests.fixtures.dashboard import DashboardServer, Watched, laptop, launched

Open = Callable[[str], Watched]


@pytest.fixture(scope="session")
def port() -> int:
    return free_port()


@pytest.fixture(scope="session")
def context() -> Iterator[BrowserContext]:
    with launched() as browser:
        yield laptop(browser)


@pytest.fixture
def server(tmp_path: Path, redis_server: RedisServer, port: int) -> Iterator[DashboardServer]:
    redis_server.start()
    with DashboardServer(tmp_path, redis_server.url, port=port) as server:
        yield server


@pytest.fixture
def open_page(context: BrowserContext, server: DashboardServer) -> Iterator[Open]:
    """Opens an address of the dashboard. At the end of the test no page may have complained or asked elsewhere."""
    opened: list[Watched] = []

    def open_one(path: str) -> Watched:
        watched = Watched(context.new_page(), urlsplit(server.url).netloc)
        opened.append(watched)
        watched.page.goto(server.url + path)
        return watched

    yield open_one
    for page in context.pages:
        page.close()
    context.clear_cookies()
    assert [error for watched in opened for error in watched.errors] == []
    assert [url for watched in opened for url in watched.foreign] == []
