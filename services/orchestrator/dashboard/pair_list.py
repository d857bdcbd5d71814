"""Where somebody is in the pairs of an iteration: the query, the page of the list, and the pair that is read."""

from __future__ import annotations

import asyncio
from urllib.parse import urlencode

from services.contracts.browsing import PairDetail, PairPage, PairQuery
from services.contracts.errors import NotFound
from services.orchestrator.pair_reading import pair_detail, pair_page
from services.orchestrator.runs import RunService
from services.platform.store import ArtifactStore

PAGE = 50
"""Pairs of the list at once; the others stay on the server."""


class PairList:
    """A reader's place. Positions count what the query finds; numbers are rows of pairs.parquet.

    Attributes:
        position: Of the pair that is read; None when the query finds none.
    """

    def __init__(self, store: ArtifactStore, runs: RunService, run: str, iteration: int, query: PairQuery) -> None:
        self.run, self.iteration, self.query = run, iteration, query
        self.page: PairPage | None = None
        self.detail: PairDetail | None = None
        self.position: int | None = None
        self._store, self._runs = store, runs

    @property
    def total(self) -> int:
        """Pairs that the query finds."""
        return self.page.total if self.page else 0

    async def find(self, query: PairQuery) -> None:
        """Ask something else and read the first pair found. Raises NotFound, InvalidInput."""
        self.query = query
        self.page = await self._take(0)
        await self.go(0)

    async def open(self, number: int | None, position: int | None) -> None:
        """Begin with a pair of a link.

        Args:
            number: The pair; None for the first.
            position: Where the list had it when the link was made; a hint.

        Raises:
            NotFound: there is no such pair, or there are no pairs yet.
        """
        if position is None and self.query == PairQuery():
            position = number
        self.page = await self._take(_start(position or 0))
        if number is None:
            await self.go(position or 0)
            return
        if number in self.page.numbers:
            await self.go(self.page.offset + self.page.numbers.index(number))
            return
        self.position = None  # the query does not find it there; it is read all the same
        self.detail = await self._read(number)

    async def go(self, position: int) -> None:
        """Read the pair at a position, or the nearest there is."""
        if not self.total:
            self.position, self.detail = None, None
            return
        position = max(0, min(position, self.total - 1))
        page = self.page
        if page is None or not page.offset <= position < page.offset + len(page.rows):
            self.page = page = await self._take(_start(position))
        self.detail = await self._read(page.numbers[position - page.offset])
        self.position = position

    async def turn(self, pages: int) -> None:
        """Turn pages of the list; what is read stays."""
        if self.page is not None:
            start = self.page.offset + pages * PAGE
            if 0 <= start < self.total:
                self.page = await self._take(start)

    def address(self) -> str:
        """Link to what is shown now."""
        told = {"iteration": self.iteration, "number": self.detail.number if self.detail else None}
        asked = self.query.model_dump(exclude_defaults=True)
        if asked and self.position is not None:
            told["at"] = self.position
        values = {name: value for name, value in (told | asked).items() if value is not None}
        return f"/ui/runs/{self.run}/pairs?{urlencode(values)}"

    async def _take(self, offset: int) -> PairPage:
        return await asyncio.to_thread(pair_page, self._store, self.run, self.iteration, self.query, offset, PAGE)

    async def _read(self, number: int) -> PairDetail:
        if number < 0:
            raise NotFound(f"pairs are numbered from 0; there is no pair {number}", field="number")
        record = await asyncio.to_thread(self._runs.runbook.record, self.run)
        return await asyncio.to_thread(pair_detail, self._store, record, self.iteration, number)


def _start(position: int) -> int:
    return max(0, position) // PAGE * PAGE
