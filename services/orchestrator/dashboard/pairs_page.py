"""The browser of an iteration's pairs: a list to filter and sort, and the pair that is read."""

from __future__ import annotations

import asyncio
import json
from html import escape
from typing import Any

from fastapi import Request
from nicegui import ui
from nicegui.events import GenericEventArguments, KeyEventArguments
from pydantic import ValidationError

from services.contracts.browsing import PairPage, PairQuery
from services.contracts.errors import InvalidInput, NotFound, RatchetError
from services.contracts.runs import RunView
from services.orchestrator.dashboard import figures, panels
from services.orchestrator.dashboard.layout import button, html, not_found, page, show
from services.orchestrator.dashboard.pair_list import PAGE, PairList
from services.orchestrator.dashboard.viewer import Viewer

SORTS = {
    "row": "order made", "margin": "margin", "chosen_reward": "chosen reward", "rejected_reward": "rejected reward",
    "chosen_tokens": "chosen length", "rejected_tokens": "rejected length",
}  # fmt: skip
COLUMNS: list[dict[str, Any]] = [
    {"name": "number", "label": "#", "field": "number", "align": "right", "classes": "num"},
    {"name": "prompt", "label": "Prompt", "field": "prompt", "align": "left", "classes": "snippet"},
    {"name": "margin", "label": "Margin", "field": "margin", "align": "right", "classes": "num"},
    {"name": "chosen", "label": "Chosen", "field": "chosen", "align": "right", "classes": "num"},
    {"name": "rejected", "label": "Rejected", "field": "rejected", "align": "right", "classes": "num"},
]
ROW = """
<q-tr :props="props" :class="{picked: props.row.picked}" :aria-selected="props.row.picked"
      :data-number="props.row.number" tabindex="0" @click="() => $parent.$emit('pick', props.row.position)"
      @keydown.enter="() => $parent.$emit('pick', props.row.position)">
  <q-td v-for="col in props.cols" :key="col.name" :props="props">{{ col.value }}</q-td>
</q-tr>
"""
HINT = "<kbd>j</kbd> <kbd>→</kbd> next &nbsp; <kbd>k</kbd> <kbd>←</kbd> previous &nbsp; <kbd>/</kbd> search"
TYPING_MILLISECONDS = 300
SNIPPET = 90
NEXT, PREVIOUS = ("j", "ArrowRight"), ("k", "ArrowLeft")


async def pairs_page(
    request: Request, run: str, iteration: int | None, number: int | None, at: int | None, asked: dict[str, Any]
) -> None:
    """The pairs of an iteration; of the latest that has some, when none is named."""
    with page(request, f"Pairs of {run}", "runs") as viewer:
        dashboard = viewer.dashboard
        try:
            view = await dashboard.runs.view(run)
            query = pair_query(asked)
            chosen = iteration if iteration is not None else latest_with_pairs(view)
            pairs = PairList(dashboard.store, dashboard.runs, run, chosen, query)
            await pairs.open(number, at)
        except RatchetError as error:
            _crumbs(run)
            not_found(viewer, error)
            return
        _PairsPage(viewer, view, pairs)


def pair_query(asked: dict[str, Any]) -> PairQuery:
    """A query from what a link or the fields say. Raises InvalidInput."""
    try:
        return PairQuery.model_validate(asked)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(f"{field}: {first['msg']}", field=field) from error


def latest_with_pairs(view: RunView) -> int:
    """Number of the latest iteration that has pairs. Raises NotFound."""
    for one in reversed(view.iterations):
        if one.iteration > 0 and any(stage.stage == "pair" and stage.state == "succeeded" for stage in one.stages):
            return one.iteration
    raise NotFound(f"no iteration of run {view.id} has pairs yet; they are made once its responses are scored")


def pair_rows(page: PairPage, picked: int | None) -> list[dict[str, Any]]:
    """Rows of the list."""
    return [
        {
            "number": number, "position": page.offset + place, "picked": number == picked,
            "prompt": figures.short(row.prompt[-1].content, SNIPPET), "margin": figures.number(row.margin),
            "chosen": figures.number(row.chosen_reward), "rejected": figures.number(row.rejected_reward),
        }
        for place, (number, row) in enumerate(zip(page.numbers, page.rows, strict=True))
    ]  # fmt: skip


def _crumbs(run: str) -> None:
    html(
        '<nav class="crumbs" aria-label="Path"><a href="/ui/">Runs</a><span>/</span>'
        f'<a href="/ui/runs/{escape(run)}">{escape(run)}</a><span>/</span><span>pairs</span></nav>'
    ).classes("early")


class _PairsPage:
    def __init__(self, viewer: Viewer, view: RunView, pairs: PairList) -> None:
        self._viewer, self._pairs = viewer, pairs
        self._turn = asyncio.Lock()
        self._wanted = pairs.position
        self._rows: list[dict[str, Any]] = []
        _crumbs(view.id)
        with ui.element("div").classes("head"):
            html("<h1>Pairs</h1>")
            with ui.element("div").classes("actions"):
                with_pairs = [one.iteration for one in view.iterations if one.iteration > 0] or [pairs.iteration]
                ui.select(
                    {number: f"iteration {number}" for number in sorted({*with_pairs, pairs.iteration})},
                    value=pairs.iteration, label="Iteration", on_change=lambda event: self._other(event.value),
                ).props("outlined dense options-dense").classes("iteration")  # fmt: skip
        with ui.element("div").classes("browser"):
            with ui.element("section").classes("card finder").props('aria-label="Find pairs"'):
                self._filters()
                self._list()
            with ui.element("section").classes("card").props('aria-label="The pair that is read"'):
                self._reading()
        ui.keyboard(on_key=self._key, ignore=["input", "select", "textarea"])
        self._show()

    def _filters(self) -> None:
        query = self._pairs.query
        typed = f"outlined dense clearable debounce={TYPING_MILLISECONDS}"
        with ui.element("div").classes("filters").props("role=search"):
            self._search = ui.input("Search prompt, chosen and rejected", value=query.search or "", on_change=self._ask)
            self._search.props(typed + " maxlength=200").classes("search")
            self._least = ui.number("Margin from", value=query.min_margin, step=0.1, on_change=self._ask).props(typed)
            self._most = ui.number("Margin to", value=query.max_margin, step=0.1, on_change=self._ask).props(typed)
            self._sort = ui.select(SORTS, value=query.sort, label="Sort by", on_change=self._ask).classes("sort")
            self._sort.props("outlined dense options-dense")
            self._order = ui.checkbox("largest first", value=query.descending, on_change=self._ask)
            self._order.props("dense").classes("order")
        self._wrong = html()

    def _list(self) -> None:
        with ui.element("div").classes("pair-list"):
            self._table = ui.table(columns=COLUMNS, rows=[], row_key="number").props("flat dense")
            self._table.add_slot("body", ROW)
            self._table.on("pick", self._pick)
        with ui.element("div").classes("pager"):
            self._found = html(tag="span").props("aria-live=polite data-part=found")
            ui.element("div").classes("gap")
            self._back = button("", "chevron_left", lambda: self._page(-1), kind="btn-plain", marker="page-back")
            self._back.props('aria-label="Previous page"')
            self._forth = button("", "chevron_right", lambda: self._page(1), kind="btn-plain", marker="page-forth")
            self._forth.props('aria-label="Next page"')

    def _reading(self) -> None:
        with ui.element("div").classes("reading-head"):
            self._title = html(tag="h2").props("aria-live=polite")
            ui.element("div").classes("gap")
            html(HINT, tag="span").classes("keyhint")
            self._previous = button("Previous", "arrow_back", lambda: self._step(-1), marker="previous")
            self._next = button("Next", "arrow_forward", lambda: self._step(1), marker="next")
        self._pair = html()

    async def _key(self, event: KeyEventArguments) -> None:
        if not event.action.keydown or event.modifiers.ctrl or event.modifiers.alt or event.modifiers.meta:
            return
        if event.key.name in NEXT:
            await self._step(1)
        elif event.key.name in PREVIOUS:
            await self._step(-1)
        elif event.key.name == "/":
            self._search.run_method("focus")

    async def _step(self, by: int) -> None:
        """Go on by one. Keys come faster than pairs are read: only the place where they end is read."""
        start = self._wanted if self._wanted is not None else -1
        self._wanted = max(0, min(start + by, self._pairs.total - 1))
        async with self._turn:
            if self._wanted != self._pairs.position:
                await self._do(self._pairs.go(self._wanted))

    async def _pick(self, event: GenericEventArguments) -> None:
        self._wanted = int(event.args)
        async with self._turn:
            await self._do(self._pairs.go(self._wanted))

    async def _page(self, by: int) -> None:
        async with self._turn:
            await self._do(self._pairs.turn(by))

    async def _ask(self) -> None:
        async with self._turn:
            asked = {
                "search": str(self._search.value or "").strip() or None, "min_margin": self._least.value,
                "max_margin": self._most.value, "sort": self._sort.value, "descending": bool(self._order.value),
            }  # fmt: skip
            try:
                query = pair_query(asked)
            except RatchetError as error:
                show(self._wrong, panels.problem(error.problem()))
                return
            if query != self._pairs.query:
                await self._do(self._pairs.find(query))
                self._wanted = self._pairs.position

    async def _do(self, change: Any) -> None:
        try:
            await change
        except RatchetError as error:
            show(self._wrong, panels.problem(error.problem()))
            return
        show(self._wrong, "")
        self._show()
        address = json.dumps(self._pairs.address())
        self._viewer.client.run_javascript(
            f'history.replaceState(null, "", {address}); ratchetScrollTo(".pair-list .picked")'
        )

    def _other(self, iteration: int) -> None:
        ui.navigate.to(f"/ui/runs/{self._pairs.run}/pairs?iteration={iteration}")

    def _show(self) -> None:
        pairs, listed = self._pairs, self._pairs.page
        picked = pairs.detail.number if pairs.detail else None
        rows = pair_rows(listed, picked) if listed else []
        if self._rows != rows:
            self._rows = self._table.rows = rows
        first = listed.offset + 1 if listed and rows else 0
        last = first + len(rows) - 1 if rows else 0
        span = f"{figures.count(first)} {figures.NONE} {figures.count(last)}"
        show(self._found, f"{span} of <b>{figures.count(pairs.total)}</b> pairs")
        self._back.set_enabled(first > 1)
        self._forth.set_enabled(bool(listed) and first - 1 + PAGE < pairs.total)
        self._previous.set_enabled(bool(pairs.position))
        self._next.set_enabled(pairs.total > 0 and (pairs.position is None or pairs.position < pairs.total - 1))
        if pairs.detail is None:
            show(self._title, "Nothing found")
            show(self._pair, '<div class="empty">No pair matches. Take something out of the filter.</div>')
            return
        place = ""
        if pairs.position is not None:
            found = f"{figures.count(pairs.position + 1)} of {figures.count(pairs.total)} found"
            place = f'<span class="quiet"> · {found}</span>'
        show(self._title, f"Pair {pairs.detail.number}{place}")
        show(self._pair, panels.pair(pairs.detail))
