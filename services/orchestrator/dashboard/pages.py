"""The addresses of the dashboard."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request
from nicegui import ui

from services.orchestrator.dashboard.pairs_page import pairs_page
from services.orchestrator.dashboard.run_page import run_page
from services.orchestrator.dashboard.runs_page import runs_page
from services.orchestrator.dashboard.services_page import services_page

BUILD_SECONDS = 20.0
"""A page waits so long for the store or Redis; their own deadlines are shorter and say what is wrong."""


def register() -> None:
    """Tell NiceGUI of all pages. Once per process."""

    @ui.page("/", response_timeout=BUILD_SECONDS)
    async def runs(request: Request) -> None:  # pyright: ignore[reportUnusedFunction]
        await runs_page(request)

    @ui.page("/runs/{run}", response_timeout=BUILD_SECONDS)
    async def run(request: Request, run: str) -> None:  # pyright: ignore[reportUnusedFunction]
        await run_page(request, run)

    @ui.page("/runs/{run}/pairs", response_timeout=BUILD_SECONDS)
    async def pairs(  # pyright: ignore[reportUnusedFunction]
        request: Request, run: str, iteration: Annotated[int | None, Query()] = None,
        number: Annotated[int | None, Query()] = None, at: Annotated[int | None, Query()] = None,
        search: Annotated[str, Query()] = "", min_margin: Annotated[float | None, Query()] = None,
        max_margin: Annotated[float | None, Query()] = None, sort: Annotated[str, Query()] = "row",
        descending: Annotated[bool, Query()] = False,
    ) -> None:  # fmt: skip
        asked = {
            "search": search or None, "min_margin": min_margin, "max_margin": max_margin, "sort": sort,
            "descending": descending,
        }  # fmt: skip
        await pairs_page(request, run, iteration, number, at, asked)

    @ui.page("/services", response_timeout=BUILD_SECONDS)
    async def services(request: Request) -> None:  # pyright: ignore[reportUnusedFunction]
        await services_page(request)
