"""What the pages look at, kept fresh by the event stream: one follower per run, shared by all who look at it."""

from __future__ import annotations

import asyncio
import contextvars
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any

from services.contracts.errors import RatchetError
from services.contracts.layout import ALL_RUNS
from services.contracts.runs import RunStatus, RunView
from services.orchestrator.dashboard.training_curve import TrainingCurve
from services.orchestrator.runs import RunService
from services.platform.logs import get_logger

log = get_logger(__name__)

REFRESH_SECONDS = 0.5
"""At most two refreshes a second, however many events there are."""
LOAD = 4.0
"""Looking may take a fifth of the time: a view that took long to make is followed by a pause four times as long."""
TICK_SECONDS = 5.0
"""Elapsed times go on without events; a queued run starts by an event of another run."""
LINGER_SECONDS = 5.0
"""A page that is reloaded finds its feed as it was, and no history is read again."""

Callback = Callable[[], None]


class Feed(ABC):
    """Something that is looked at by any number of pages and refreshed while there are any.

    Subclasses say how to refresh (`look`) and what else goes on meanwhile (`follow`).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.error: RatchetError | None = None
        self._callbacks: set[Callback] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()
        self._closing: asyncio.TimerHandle | None = None

    @property
    def watchers(self) -> int:
        """Pages that look."""
        return len(self._callbacks)

    @property
    def running(self) -> bool:
        """Whether it is refreshed and followed."""
        return bool(self._tasks) and not any(task.done() for task in self._tasks)

    def subscribe(self, callback: Callback) -> Callback:
        """Call `callback` after every refresh; returns what ends that."""
        self._callbacks.add(callback)
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
        if not self.running:
            for task in self._tasks:
                task.cancel()  # one of them ended, which none should
            self._tasks = [self._start(self._refresh(), "refresh"), self._start(self._follow(), "follow")]

        def end() -> None:
            self._drop(callback)

        return end

    def change(self) -> None:
        """Something happened: refresh soon."""
        self._changed.set()

    def close(self) -> None:
        """Stop following."""
        self._closing = None
        for task in self._tasks:
            task.cancel()
        self._tasks = []

    @abstractmethod
    async def look(self) -> None:
        """Bring what is shown up to date. May raise RatchetError, which is shown until the next look."""

    @abstractmethod
    async def follow(self) -> None:
        """Call `change` whenever something happens, for ever."""

    def _drop(self, callback: Callback) -> None:
        self._callbacks.discard(callback)
        if not self._callbacks and self._closing is None:
            loop = asyncio.get_running_loop()
            self._closing = loop.call_later(LINGER_SECONDS, self.close, context=contextvars.Context())

    def _start(self, work: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
        # In a context of its own: it outlives the request of the page that happened to come first.
        task = asyncio.get_running_loop().create_task(
            work, name=f"dashboard {what} {self.name}", context=contextvars.Context()
        )
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("dashboard_feed_ended", feed=self.name, exc_info=error)

    async def _refresh(self) -> None:
        while True:
            self._changed.clear()
            started = time.monotonic()
            self.error = await self._looked()
            for callback in tuple(self._callbacks):
                try:
                    callback()
                except Exception:
                    log.exception("dashboard_page_failed", feed=self.name, then="it is told nothing more")
                    self._drop(callback)
            await asyncio.sleep(max(REFRESH_SECONDS, LOAD * (time.monotonic() - started)))
            try:
                await asyncio.wait_for(self._changed.wait(), TICK_SECONDS)
            except TimeoutError:
                continue

    async def _looked(self) -> RatchetError | None:
        try:
            await self.look()
        except RatchetError as error:
            return error
        except Exception as error:
            log.exception("dashboard_look_failed", feed=self.name)
            return RatchetError(
                f"{self.name} could not be looked at: {error!r}. What is shown may be old; it is tried again, and the "
                "orchestrator's log says more."
            )
        return None

    async def _follow(self) -> None:
        """Follow for ever; what ends all the same is begun anew, and the pages go on by the tick meanwhile."""
        while True:
            try:
                await self.follow()
                log.error("dashboard_follow_ended", feed=self.name, then="it begins anew")
            except Exception:
                log.exception("dashboard_follow_failed", feed=self.name, then="it begins anew")
            await asyncio.sleep(TICK_SECONDS)
            self.change()


class RunFeed(Feed):
    """One run: its view, and the curve of its latest training."""

    def __init__(self, run: str, runs: RunService) -> None:
        super().__init__(run)
        self.run = run
        self.view: RunView | None = None
        self.training = TrainingCurve()
        self._runs = runs
        self._after = "0"

    async def look(self) -> None:
        """Take the run's view."""
        self.view = await self._runs.view(self.run)

    async def follow(self) -> None:
        """Follow the run's events, the kept ones first: the curve of a training under way begins before the page."""
        async for event in self._runs.conductor.events.follow(self.run, self._after):
            self._after = event.id
            self.training.add(event)
            self.change()


class RunsFeed(Feed):
    """All runs, newest first. What cannot change by itself is looked at only when an event says that it did.

    Args:
        of: The feed of one run; those of running runs tell the progress of their stages.
    """

    def __init__(self, runs: RunService, of: Callable[[str], RunFeed]) -> None:
        super().__init__(ALL_RUNS)
        self.views: tuple[RunView, ...] | None = None
        self._runs = runs
        self._of = of
        self._known: dict[str, RunView] = {}
        self._stale: set[str] = set()
        self._watched: dict[str, Callback] = {}

    async def look(self) -> None:
        """Take the views of runs that are new, said to have changed, or at work. One that is unreadable is left out."""
        ids = await asyncio.to_thread(self._ids)
        for run in ids:
            known = self._known.get(run)
            if known is None or run in self._stale or known.status in (RunStatus.RUNNING, RunStatus.QUEUED):
                await self._take(run)
        self._known = {run: self._known[run] for run in reversed(ids) if run in self._known}
        self.views = tuple(self._known.values())
        self._watch({view.id for view in self.views if view.status is RunStatus.RUNNING})

    async def _take(self, run: str) -> None:
        self._stale.discard(run)  # before: what happens while the view is taken is not in it
        try:
            view = await self._runs.readable(run)
        except BaseException:
            self._stale.add(run)
            raise
        if view is None:
            self._known.pop(run, None)
        else:
            self._known[run] = view

    def _ids(self) -> list[str]:
        self._runs.runbook.refresh()
        return self._runs.runbook.ids()

    def _watch(self, running: set[str]) -> None:
        for run in self._watched.keys() - running:
            self._watched.pop(run)()
        for run in running - self._watched.keys():
            self._watched[run] = self._of(run).subscribe(self.change)

    def close(self) -> None:
        """Stop following, the running runs too."""
        super().close()
        self._watch(set())

    async def follow(self) -> None:
        """Follow what is told of all runs."""
        async for event in self._runs.conductor.events.follow(ALL_RUNS):
            run = event.data.get("run")
            if isinstance(run, str):
                self._stale.add(run)
            self.change()


class Feeds:
    """Every feed of one orchestrator."""

    def __init__(self, runs: RunService) -> None:
        self.runs = RunsFeed(runs, self.of)
        self._service = runs
        self._by_run: dict[str, RunFeed] = {}

    def of(self, run: str) -> RunFeed:
        """The feed of a run; those nobody looks at any more are forgotten."""
        self._by_run = {name: feed for name, feed in self._by_run.items() if feed.running or feed.watchers}
        return self._by_run.setdefault(run, RunFeed(run, self._service))

    def close(self) -> None:
        """Stop them all."""
        for feed in (self.runs, *self._by_run.values()):
            feed.close()
