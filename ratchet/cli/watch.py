"""Watching a run: a live view on a terminal, a line per change elsewhere; over restarts of the orchestrator."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.live import Live

from ratchet.cli import output, views
from ratchet.cli.output import note, print_line
from services.contracts.errors import DeadlineExceeded, Unavailable, UpstreamFailed
from services.contracts.runs import RunStatus, RunView

if TYPE_CHECKING:
    from ratchet.client import RatchetClient

POLL_SECONDS = 1.0
OUTAGE_SECONDS = 600.0
"""An orchestrator that does not answer for so long is given up; the run itself goes on when it comes back."""


def watch_run(client: RatchetClient, run: str) -> RunView:
    """Show a run until it is idle, paused, failed or cancelled. Ctrl-C ends the watching, not the run."""
    try:
        view = _live(client, run) if output.out.is_terminal else _lines(client, run)
    except KeyboardInterrupt:
        note(f"\nThe run goes on. 'ratchet watch {run}' shows it again, 'ratchet cancel {run}' stops it.")
        raise
    if view.problem:
        note(f"{view.problem.title}: {view.problem.detail}")
        note(f"When the cause is mended, 'ratchet resume {run}' goes on where it stopped.")
    return view


def _looks(client: RatchetClient, run: str) -> Iterator[tuple[RunView | None, str]]:
    """The run again and again, None with a remark while the orchestrator does not answer; ends with the run."""
    answered = time.monotonic()
    while True:
        try:
            view = client.run(run)
            answered = time.monotonic()
            yield view, ""
            if view.status not in (RunStatus.QUEUED, RunStatus.RUNNING):
                return
        except (Unavailable, DeadlineExceeded, UpstreamFailed) as error:
            silent = time.monotonic() - answered
            if silent > OUTAGE_SECONDS:
                raise
            yield None, f"the orchestrator does not answer ({error.detail}); trying again"
        time.sleep(POLL_SECONDS)


def _live(client: RatchetClient, run: str) -> RunView:
    view: RunView | None = None
    with Live(console=output.out, refresh_per_second=4, vertical_overflow="visible") as live:
        for seen, remark in _looks(client, run):
            view = seen or view
            if view:
                live.update(views.live_view(view, remark))
    assert view
    return view


def _lines(client: RatchetClient, run: str) -> RunView:
    printer = LinePrinter()
    view: RunView | None = None
    for seen, remark in _looks(client, run):
        if seen is None:
            printer.say_once("outage", remark)
        else:
            view = seen
            printer.show(seen)
    assert view
    return view


class LinePrinter:
    """Prints what changed: status, each stage's start, tenths and end, each decision."""

    def __init__(self) -> None:
        self._said: dict[str, str | int] = {}

    def say_once(self, key: str, line: str, mark: str | int | None = None) -> None:
        """Print a line unless the last one under this key had the same mark (the line itself by default)."""
        if self._said.get(key) != (line if mark is None else mark):
            self._said[key] = line if mark is None else mark
            print_line(f"{time.strftime('%H:%M:%S')}  {line}")

    def show(self, view: RunView) -> None:
        """Print what is new in a view."""
        self.say_once("status", f"run {view.id} is {view.status.value}")
        for iteration in view.iterations:
            if self._said.get(f"decided {iteration.iteration}"):
                continue
            for stage in iteration.stages:
                if stage.state == "waiting":
                    continue
                share = stage.items_done / stage.items_total if stage.items_total else stage.done / max(1, stage.total)
                took = f" in {output.seconds(stage.seconds)}" if stage.state in ("succeeded", "failed") else ""
                self.say_once(
                    f"{iteration.iteration} {stage.stage}",
                    f"iteration {iteration.iteration}  {stage.stage.value:<14} {stage.state}{took}"
                    f"  {views.stage_progress(stage)}".rstrip(),
                    f"{stage.state} {int(share * 10) if stage.state == 'running' else ''}",
                )
            if iteration.record:
                self._said[f"decided {iteration.iteration}"] = "yes"
                for line in views.decision_lines(iteration.record):
                    print_line(line)
