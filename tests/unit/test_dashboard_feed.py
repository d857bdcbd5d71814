"""Feeds: shared, coalesced, and ended when nobody looks."""

from __future__ import annotations

import asyncio

import pytest

from services.contracts.errors import RatchetError, Unavailable
from services.orchestrator.dashboard import feed
from services.orchestrator.dashboard.feed import Feed


class Counted(Feed):
    """Counts its looks and followers."""

    def __init__(self) -> None:
        super().__init__("counted")
        self.looks = 0
        self.followers = 0
        self.trouble: RatchetError | None = None

    async def look(self) -> None:
        self.looks += 1
        if self.trouble is not None:
            raise self.trouble

    async def follow(self) -> None:
        self.followers += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.followers -= 1


class Page:
    """Waits for what a feed calls."""

    def __init__(self) -> None:
        self.calls = 0
        self._called = asyncio.Event()

    def __call__(self) -> None:
        self.calls += 1
        self._called.set()

    async def wait(self) -> None:
        self._called.clear()
        await asyncio.wait_for(self._called.wait(), 5)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "REFRESH_SECONDS", 0.05)
    monkeypatch.setattr(feed, "LINGER_SECONDS", 0.02)


async def test_many_pages_share_one_follower_that_ends_with_the_last() -> None:
    counted, pages = Counted(), [Page() for _ in range(5)]
    ends = [counted.subscribe(page) for page in pages]
    await pages[-1].wait()
    assert (counted.followers, counted.looks) == (1, 1)
    assert [page.calls for page in pages] == [1] * 5
    for end in ends:
        assert counted.running
        end()
    async with asyncio.timeout(5):
        while counted.followers:  # noqa: ASYNC110  # a timer of the feed ends it
            await asyncio.sleep(0.005)
    assert not counted.running


async def test_a_page_that_comes_back_at_once_finds_the_feed_running() -> None:
    counted, page = Counted(), Page()
    counted.subscribe(page)()
    end = counted.subscribe(page)
    await page.wait()
    assert counted.followers == 1
    end()
    counted.close()


async def test_a_burst_of_events_is_one_refresh() -> None:
    counted, page = Counted(), Page()
    end = counted.subscribe(page)
    await page.wait()
    for _ in range(1000):
        counted.change()
    await page.wait()
    assert counted.looks == 2
    end()
    counted.close()


async def test_an_error_is_kept_for_the_pages_and_the_feed_goes_on() -> None:
    counted, page = Counted(), Page()
    counted.trouble = Unavailable("Redis is away")
    end = counted.subscribe(page)
    await page.wait()
    assert counted.error is counted.trouble
    counted.trouble = None
    counted.change()
    await page.wait()
    assert counted.error is None
    end()
    counted.close()
