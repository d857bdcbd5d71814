"""What the page must reach: shown within a second, and memory that an hour of refreshes does not fill."""

from __future__ import annotations

import asyncio
import gc
import os
import statistics

import psutil
import pytest
from playwright.sync_api import Page, expect

from services.contracts.runs import Stage
from services.orchestrator import stages
from services.orchestrator.dashboard import feed
from tests.browser.conftest import Open
from tests.fixtures.dashboard import DashboardServer
from tests.fixtures.dashboard_store import seed_pairs, seed_run

RENDER_MILLISECONDS = 1000.0
"""From the start of the navigation to the contents being visible, on a server and a cache that are warm."""
SLOW_MACHINE = float(os.environ.get("RATCHET_SLOW_MACHINE", "1"))
"""So many times the second is allowed. 1 asks for the second itself; a failure says what was allowed."""
ALLOWED = f"the median of the loads took longer than {SLOW_MACHINE:g} x {RENDER_MILLISECONDS:g} ms"
LOADS = 5
REFRESHES = int(os.environ.get("RATCHET_MEMORY_REFRESHES", "2000"))
WARM_UP = 800
"""Refreshes that fill what is bounded: the curve's points, the history of messages."""
BATCH = 200
HOUR = 7200
"""Refreshes of an hour at most, two a second."""
SAMPLING = {"prompts_per_iteration": 500, "chunk_size": 100, "max_tokens": 64, "groups": [{"n": 4, "temperature": 1.0}]}
SERVER_BYTES_PER_HOUR, PAGE_BYTES_PER_HOUR = 64 * 2**20, 16 * 2**20
COUNT_CHANGES = """() => {
  window.changes = 0;
  const shown = document.querySelector("[data-curve=training]");
  const everything = {subtree: true, childList: true, characterData: true};
  new MutationObserver(() => { window.changes += 1; }).observe(shown, everything);
}"""
"""Counts how often the page really showed another curve."""
RUN_SHOWN = """() => {
  const charts = [...document.querySelectorAll(".charts .chart")];
  const drawn = charts.every((one) => getElement(Number(one.id.slice(1)))?.chart?.getOption().series?.length);
  const decided = document.querySelectorAll(".decisions tbody tr").length;
  return charts.length >= 12 && drawn && decided === 51 && performance.now();
}"""
PAIRS_SHOWN = """() => {
  const found = document.querySelector("[data-part=found]")?.textContent.includes("of 20,000 pairs");
  const listed = document.querySelectorAll(".pair-list tbody tr").length;
  return found && listed === 50 && document.querySelectorAll(".response").length === 4 && performance.now();
}"""


def median_milliseconds(page: Page, url: str, shown: str) -> float:
    """Median over several loads, after one that warms server and cache."""
    taken: list[float] = []
    for _ in range(LOADS + 1):
        page.goto("about:blank")
        page.goto(url, wait_until="commit")
        taken.append(page.wait_for_function(shown, timeout=30_000).json_value())
    print(f"{url}: {[round(one) for one in taken]} ms")
    return statistics.median(taken[1:])


def test_a_run_of_50_iterations_is_shown_within_a_second(server: DashboardServer, open_page: Open) -> None:
    seed_run(server.stack.store, "long", 50)
    page = open_page("/ui/services").page
    assert median_milliseconds(page, server.url + "/ui/runs/long", RUN_SHOWN) < RENDER_MILLISECONDS * SLOW_MACHINE, (
        ALLOWED
    )


def test_a_list_of_20000_pairs_is_shown_within_a_second(server: DashboardServer, open_page: Open) -> None:
    record = seed_run(server.stack.store, "r", 1, changes={"sampling": SAMPLING})
    seed_pairs(server.stack.store, record, 1, 500, copies=40)
    page = open_page("/ui/services").page
    url = server.url + "/ui/runs/r/pairs?iteration=1"
    assert median_milliseconds(page, url, PAIRS_SHOWN) < RENDER_MILLISECONDS * SLOW_MACHINE, ALLOWED


@pytest.mark.timeout(420)  # 20 refreshes a second where the cores are free
def test_2000_refreshes_add_no_more_memory_each_than_an_hour_of_them_may(
    server: DashboardServer, open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "REFRESH_SECONDS", 0.02)
    monkeypatch.setattr(feed, "LOAD", 0.0)
    seed_run(server.stack.store, "r", 20)
    page = open_page("/ui/runs/r").page
    expect(page.locator("[data-curve=reward] canvas")).to_be_visible()
    told = 0

    def refresh(count: int) -> None:
        nonlocal told
        for _ in range(count // BATCH):
            server.call(_refresh(server, told))
            told += BATCH
            page.wait_for_function(
                f"document.querySelector('[data-curve=training] .keys')?.textContent.includes('margin {told:,}.000')"
            )

    refresh(WARM_UP)
    page.evaluate(COUNT_CHANGES)
    server_before, page_before = _server_bytes(), _page_bytes(page)
    refresh(REFRESHES)
    server_grown, page_grown = _server_bytes() - server_before, _page_bytes(page) - page_before
    shown: int = page.evaluate("window.changes")
    server_hour, page_hour = server_grown * HOUR / REFRESHES, page_grown * HOUR / shown
    print(
        f"{REFRESHES} refreshes, {shown} shown: server {server_grown / 2**20:+.1f} MiB, page {page_grown / 2**20:+.1f} "
        f"MiB; an hour of {HOUR}: server {server_hour / 2**20:+.1f} MiB, page {page_hour / 2**20:+.1f} MiB"
    )
    assert shown >= 0.9 * REFRESHES
    assert server_hour < SERVER_BYTES_PER_HOUR
    assert page_hour < PAGE_BYTES_PER_HOUR
    assert server.stack.app.state.dashboard_feeds.of("r").watchers == 1


async def _refresh(server: DashboardServer, first: int) -> None:
    """Refresh the page as often as a batch says: each event only when the one before it was shown."""
    events = server.stack.app.state.runs.conductor.events
    job = stages.job_id("r", 21, Stage.TRAIN)
    watched = server.stack.app.state.dashboard_feeds.of("r")
    refreshed = asyncio.Event()

    def seen() -> None:
        if watched.training.points and watched.training.points[-1].step == step:
            refreshed.set()

    step = first
    end = watched.subscribe(seen)
    for step in range(first + 1, first + BATCH + 1):
        refreshed.clear()
        figures = {
            "phase": "training", "step": step, "total_steps": 10**6, "loss": 0.5, "accuracy": 0.7, "margin": step
        }  # fmt: skip
        await events.publish("r", "job.progress", figures, job, "dpo")
        await refreshed.wait()
    end()


def _server_bytes() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def _page_bytes(page: Page) -> int:
    session = page.context.new_cdp_session(page)
    session.send("HeapProfiler.collectGarbage")
    used: int = page.evaluate("performance.memory.usedJSHeapSize")
    session.detach()
    return used
