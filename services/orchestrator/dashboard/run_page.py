"""The page of one run: what it does now, how it got on, and the buttons that control it."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from nicegui import ui

from services.contracts.errors import RatchetError
from services.contracts.runs import IterationView, RunStatus, RunView, Stage
from services.orchestrator import stages
from services.orchestrator.dashboard import panels
from services.orchestrator.dashboard.actions import RunActions
from services.orchestrator.dashboard.curves import Curve, curves, training_curve
from services.orchestrator.dashboard.feed import RunFeed
from services.orchestrator.dashboard.layout import html, not_found, page, show
from services.orchestrator.dashboard.training_curve import TrainingPoint, points_of
from services.orchestrator.dashboard.viewer import Viewer

MARKS = '<div class="marks"><span>◆ baseline</span><span>● promoted</span><span>✕ rejected</span></div>'


async def run_page(request: Request, run: str) -> None:
    """A run, live."""
    with page(request, run, "runs") as viewer:
        feed = viewer.dashboard.feeds.of(run)
        try:
            await feed.look()
        except RatchetError as error:
            not_found(viewer, error)
            return
        assert feed.view is not None
        shown = _RunPage(viewer, feed, feed.view)
        await shown.load_training()
        viewer.watch(feed, shown.update)


class _Chart:
    """A chart in its card."""

    def __init__(self, curve: Curve) -> None:
        with ui.element("section").classes("card chart-card").props(f'data-curve="{curve.id}"') as self.card:
            self._key = html(panels.key(curve))
            self._drawn = curve.options
            self._chart = ui.echart(curve.options).classes("chart")

    def update(self, curve: Curve) -> None:
        """Show what is new, if anything is."""
        show(self._key, panels.key(curve))
        if self._drawn != curve.options:
            self._drawn = curve.options
            options: dict[str, Any] = self._chart.options  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            options.clear()
            options.update(curve.options)
            self._chart.update()


class _RunPage:
    def __init__(self, viewer: Viewer, feed: RunFeed, view: RunView) -> None:
        self._viewer, self._feed = viewer, feed
        self._finished: list[TrainingPoint] = []
        self._finished_of: int | None = None
        self._arranged = ""
        self._shown = history(view)
        html(
            f'<nav class="crumbs" aria-label="Path"><a href="/ui/">Runs</a><span>/</span><span>{view.id}</span></nav>'
        ).classes("early")
        with ui.element("div").classes("head"):
            with ui.element("div").classes("head-text"):
                html(f"<h1>{view.id}</h1>")
                self._status = html(panels.status_line(view))
            with ui.element("div").classes("actions").props('role=group aria-label="Control"'):
                self._actions = RunActions(viewer, view)
        self._trouble = html(panels.trouble(view)).classes("early")
        self._tiles = html(panels.tiles(view)).classes("early")
        with ui.element("div") as self._live:
            with ui.element("section").classes("card").props("data-part=stages"):
                self._stages_head = html(self._stages_title(view), tag="div").classes("card-head")
                self._stages = html(panels.stage_table(panels.current(view))).classes("card-body")
            self._training = _Chart(self._training_curve())
        html(f'<div class="card-head" style="border: 0; padding: 6px 2px 0"><h2>Curves</h2>{MARKS}</div>')
        with ui.element("div").classes("charts"):
            self._charts = {curve.id: _Chart(curve) for curve in curves(view)}
        with ui.element("section").classes("card late").props("data-part=decisions"):
            html("<h2>Decisions of the gate</h2>").classes("card-head")
            self._decisions = html(panels.decisions(view)).classes("card-body")
        recipe = f'<summary>Recipe</summary><div class="card-body">{panels.recipe(view)}</div>'
        html(recipe, tag="details").classes("card late")
        self._trouble.visible = bool(self._trouble.content)
        self._arrange(view)

    def update(self) -> None:
        """Show the feed's latest; what has not changed is not sent again."""
        view = self._feed.view
        if view is None:
            return
        show(self._status, panels.status_line(view))
        show(self._trouble, panels.trouble(view))
        self._trouble.visible = bool(self._trouble.content)
        show(self._stages_head, self._stages_title(view))
        show(self._stages, panels.stage_table(panels.current(view)))
        self._actions.update(view)
        self._training.update(self._training_curve())
        self._arrange(view)
        known = history(view)
        if known != self._shown:  # seldom, and the dearest to make
            self._shown = known
            show(self._tiles, panels.tiles(view))
            show(self._decisions, panels.decisions(view))
            for curve in curves(view):
                self._charts[curve.id].update(curve)

    async def load_training(self) -> None:
        """The curve of the latest finished training, from its job: the event stream keeps only the latest events."""
        view = self._feed.view
        trained = [one.iteration for one in (view.iterations if view else ()) if _trained(one)]
        if view is None or not trained:
            return
        queue = self._viewer.dashboard.runs.queue
        job = await queue.get(stages.job_id(self._feed.run, trained[-1], Stage.TRAIN))
        if job is not None and job.result is not None:
            self._finished, self._finished_of = points_of(job.result.get("curve") or ()), trained[-1]
            self._training.update(self._training_curve())
            self._arrange(view)

    def _arrange(self, view: RunView) -> None:
        """What goes on stands above the curves; once it is decided, below them."""
        shown = panels.current(view)
        trained = bool(self._feed.training.points or self._finished)
        wanted = "live" + (" settled" if shown is not None and shown.record is not None else "")
        wanted += "" if trained else " alone"
        if wanted != self._arranged:
            self._live.classes(replace=wanted)
            self._training.card.visible = trained
            self._arranged = wanted

    def _training_curve(self) -> Curve:
        live = self._feed.training
        if live.points and (self._finished_of is None or (live.iteration or 0) >= self._finished_of):
            return training_curve(live.points, live.iteration)
        return training_curve(self._finished, self._finished_of)

    @staticmethod
    def _stages_title(view: RunView) -> str:
        shown = panels.current(view)
        if shown is None:
            return "<h2>Stages</h2>"
        name = f"Iteration {shown.iteration}" if shown.iteration else "Baseline"
        at_work = view.status is RunStatus.RUNNING
        state = "decided" if shown.record is not None else "under way" if at_work else view.status.value
        return f'<h2>{name}</h2><span class="quiet">{state}</span>'


def history(view: RunView) -> tuple[str | None, tuple[tuple[int, int], ...]]:
    """The incumbent, which a rollback sets back, and which iterations are decided, with how often each is judged.

    It is what tiles, curves and decisions are made of.
    """
    return view.incumbent, tuple(
        (one.iteration, len(one.judgements)) for one in view.iterations if one.record is not None
    )


def _trained(one: IterationView) -> bool:
    return any(stage.stage is Stage.TRAIN and stage.state == "succeeded" for stage in one.stages)
