"""Feeds: shared, coalesced, and ended when nobody looks."""

from __future__ import annotations

import asyncio

import pytest

from services.contracts.errors import RatchetError, StoreError, Unavailable
from services.contracts.layout import ALL_RUNS
from services.contracts.runs import RunStatus, RunView
from services.orchestrator.dashboard import feed
from services.orchestrator.dashboard.feed import Feed, RunFeed, RunsFeed
from services.orchestrator.runs import RunService
from tests.fixtures.orchestrator_stack import recipe


class Counted(Feed):
    """Counts its looks and followers."""

    def __init__(self) -> None:
        super().__init__("counted")
        self.looks = 0
        self.followers = 0
        self.trouble: Exception | None = None
        self.deaf: Exception | None = None

    async def look(self) -> None:
        self.looks += 1
        if self.trouble is not None:
            raise self.trouble

    async def follow(self) -> None:
        self.followers += 1
        try:
            if self.deaf is not None:
                raise self.deaf
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


async def test_a_page_that_fails_ends_for_itself_alone() -> None:
    counted, page = Counted(), Page()
    failed = 0

    def broken() -> None:
        nonlocal failed
        failed += 1
        raise KeyError("a metric that is not there")

    counted.subscribe(broken)
    end = counted.subscribe(page)
    for _ in range(3):
        counted.change()
        await page.wait()
    assert failed == 1
    assert counted.watchers == 1
    assert counted.running
    end()
    counted.close()


async def test_a_look_that_fails_unexpectedly_is_told_and_tried_again() -> None:
    counted, page = Counted(), Page()
    counted.trouble = ZeroDivisionError("nothing was sampled")
    end = counted.subscribe(page)
    await page.wait()
    assert counted.error is not None
    assert "nothing was sampled" in counted.error.detail
    counted.trouble = None
    counted.change()
    await page.wait()
    assert counted.error is None
    end()
    counted.close()


async def test_a_follower_that_fails_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "TICK_SECONDS", 0.02)
    counted, page = Counted(), Page()
    counted.deaf = ValueError("an event that nobody can read")
    end = counted.subscribe(page)
    await page.wait()
    counted.deaf = None
    async with asyncio.timeout(5):
        while counted.followers == 0:
            await page.wait()
    assert counted.running
    end()
    counted.close()


async def test_a_feed_with_a_dead_task_is_not_running_and_starts_with_the_next_page() -> None:
    counted, page = Counted(), Page()
    counted.subscribe(page)
    await page.wait()
    refresh = next(task for task in asyncio.all_tasks() if task.get_name() == "dashboard refresh counted")
    refresh.cancel()
    await asyncio.wait([refresh])
    assert not counted.running
    other = Page()
    counted.subscribe(other)
    await other.wait()
    assert counted.running
    assert counted.followers == 1
    counted.close()


class Shelf:
    """The views of a few runs, some of which cannot be read."""

    def __init__(self) -> None:
        self.runbook = self
        self.conductor = self
        self.errors: dict[str, RatchetError] = {}
        self.taken: list[str] = []

    def refresh(self) -> None:
        pass

    def ids(self) -> list[str]:
        return ["a", "b", "c"]

    async def view(self, run: str) -> RunView:
        self.taken.append(run)
        if run in self.errors:
            raise self.errors[run]
        return RunView.model_validate(
            {"id": run, "status": RunStatus.IDLE, "created_at": "2026-11-24T00:00:00+00:00", "iterations_asked": 2,
             "recipe": recipe("p", "h"), "iterations_decided": 0, "incumbent": None, "iterations": ()}
        )  # fmt: skip


def runs_feed(shelf: Shelf) -> tuple[RunsFeed, RunService]:
    service = RunService.__new__(RunService)
    service.__dict__.update(runbook=shelf, view=shelf.view, _left_out={})
    return RunsFeed(service, lambda run: RunFeed(run, service)), service


def told(runs: RunsFeed, run: str) -> None:
    runs._stale.add(run)  # as an event of ALL_RUNS does


async def test_a_run_that_cannot_be_read_hides_no_other() -> None:
    shelf = Shelf()
    runs, _ = runs_feed(shelf)
    shelf.errors["b"] = StoreError("runs/b/run.json is no JSON")
    await runs.look()
    assert [view.id for view in runs.views or ()] == ["c", "a"]
    del shelf.errors["b"]
    await runs.look()
    assert [view.id for view in runs.views or ()] == ["c", "b", "a"]


async def test_a_change_is_not_lost_when_one_look_fails() -> None:
    shelf = Shelf()
    runs, _ = runs_feed(shelf)
    await runs.look()
    told(runs, "a")
    told(runs, "c")
    shelf.errors["a"] = Unavailable("Redis is away")
    with pytest.raises(Unavailable):
        await runs.look()
    shelf.errors.clear()
    shelf.taken.clear()
    await runs.look()
    assert shelf.taken == ["a", "c"]
    await runs.look()
    assert shelf.taken == ["a", "c"]
    assert runs.name == ALL_RUNS
