"""The page of all runs."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from nicegui import ui

from services.contracts.errors import RatchetError
from services.contracts.runs import RunView, StageView
from services.orchestrator.dashboard import figures, panels
from services.orchestrator.dashboard.layout import html, not_found, page

EMPTY = """
<div class="card empty"><h2>No run yet</h2>
<p>Start one; it appears here by itself. The tiny world trains its models first, which takes some minutes:</p>
<pre>docker compose run --rm tiny-world</pre>
<p>Your own models and prompts, from the command line:</p>
<pre>ratchet run recipes/tiny-cpu.toml --policy ./my-sft --reward-model ./my-reward-model \\
            --prompts prompts.jsonl --heldout heldout.jsonl --iterations 3 --id my-run</pre>
<p class="quiet">or over HTTP: <code>POST /v1/runs</code>, described at <a href="/docs">/docs</a></p></div>
"""
COLUMNS: list[dict[str, Any]] = [
    {"name": "run", "label": "Run", "field": "id", "align": "left", "sortable": True},
    {"name": "status", "label": "Status", "field": "status", "align": "left", "sortable": True},
    {"name": "progress", "label": "Progress", "field": "share", "align": "left"},
    {"name": "reward", "label": "Reward", "field": "reward", "align": "right", "classes": "num"},
    {"name": "win", "label": "Win rate", "field": "win", "align": "right", "classes": "num tablet",
     "headerClasses": "tablet"},
    {"name": "incumbent", "label": "Incumbent", "field": "incumbent", "align": "left", "classes": "tablet",
     "headerClasses": "tablet"},
    {"name": "created", "label": "Created", "field": "created_at", "align": "right", "sortable": True,
     "classes": "tablet", "headerClasses": "tablet"},
]  # fmt: skip
CELLS = {
    "run": '<a class="run-link" :href="`/ui/runs/${props.row.id}`">{{ props.row.id }}</a>',
    "status": '<span :class="`badge badge-${props.row.status}`">'
    '<i class="material-icons icon" aria-hidden="true">{{ props.row.icon }}</i>{{ props.row.status }}</span>',
    "progress": '<div class="run-progress"><div class="line"><span>{{ props.row.iterations }}</span>'
    '<span>{{ props.row.stage }}</span></div><div :class="`bar ${props.row.status}`" role="progressbar" '
    ':aria-valuenow="props.row.share" '
    'aria-valuemin="0" aria-valuemax="100" :aria-label="`progress of ${props.row.id}`">'
    '<span :style="{width: `${props.row.share}%`}"></span></div></div>',
    "incumbent": "<code>{{ props.row.incumbent }}</code>",
    "created": '<span :title="props.row.created_at">{{ props.row.created }}</span>',
}


async def runs_page(request: Request) -> None:
    """All runs, newest first, live."""
    with page(request, "Runs", "runs") as viewer:
        html("<h1>Runs</h1>")
        feed = viewer.dashboard.feeds.runs
        try:
            await feed.look()
        except RatchetError as error:
            not_found(viewer, error)
            return
        empty = html(EMPTY)
        table = ui.table(columns=COLUMNS, rows=[], row_key="id").classes("card").props("flat wrap-cells")
        for name, cell in CELLS.items():
            table.add_slot(f"body-cell-{name}", f'<q-td :props="props">{cell}</q-td>')

        shown: list[dict[str, Any]] = []

        def update() -> None:
            views = feed.views or ()
            rows = [run_row(view) for view in views]
            if rows != shown:
                shown[:] = rows
                table.rows = rows
            if empty.visible == bool(views):
                empty.visible, table.visible = not views, bool(views)

        table.visible = False
        update()
        viewer.watch(feed, update)


def run_row(view: RunView) -> dict[str, Any]:
    """One row of the table."""
    records = [one.record for one in view.iterations if one.record is not None]
    latest = records[-1].metrics if records else None
    stage = panels.active_stage(view)
    decided = view.iterations_decided
    return {
        "id": view.id,
        "status": view.status.value,
        "icon": panels.STATUS_ICONS[view.status],
        "iterations": f"{decided} of {view.iterations_asked}" if records else "baseline",
        "stage": f"{panels.STAGE_NAMES[stage.stage].lower()} {_how_far(stage)}" if stage else "",
        "share": round(100 * decided / view.iterations_asked) if view.iterations_asked else 100 if records else 0,
        "incumbent": view.incumbent or figures.NONE,
        "reward": figures.number(latest.proxy_reward) if latest else figures.NONE,
        "win": figures.percent(latest.win_rate_vs_reference) if latest else figures.NONE,
        "created": figures.ago(view.created_at),
        "created_at": figures.moment(view.created_at),
    }


def _how_far(stage: StageView) -> str:
    return "failed" if stage.state == "failed" else figures.percent(panels.progress(stage), 0)
