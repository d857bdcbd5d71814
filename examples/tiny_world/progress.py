"""What the tiny world says while it works: a live line on a terminal, and a line per change in a log."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.text import Text

from services.contracts.jobs import Job
from services.contracts.training import TrainingProgress

JobWatcher = Callable[[Job, TrainingProgress | None], None]


class Progress:
    """Says steps, remarks and the progress of training jobs on a console."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def step(self, number: str, text: str) -> None:
        """Say what begins."""
        self.console.print(Text.assemble((number, "bold cyan"), f" {text}"), soft_wrap=True)

    def remark(self, text: str) -> None:
        """Say something about the present step. Text of models and services is never read as markup."""
        self.console.print(Text(f"    {text}"), soft_wrap=True)

    @contextlib.contextmanager
    def job(self, name: str) -> Iterator[JobWatcher]:
        """Show a job's progress: in place on a terminal; elsewhere a line when a phase or a fifth of it is over."""
        if self.console.is_terminal:
            with self.console.status(f"    {name}") as status:
                yield lambda _, progress: status.update(Text(f"    {name}: {told(progress)}"))
            return
        said: list[str] = []

        def watch(_: Job, progress: TrainingProgress | None) -> None:
            mark = "waiting" if progress is None else f"{progress.phase} {_fifth(progress)}"
            if said[-1:] != [mark]:
                said.append(mark)
                self.remark(f"{name}: {told(progress)}")

        yield watch


def told(progress: TrainingProgress | None) -> str:
    """A training's progress in a few words."""
    if progress is None:
        return "waiting for the trainer"
    if not progress.total_steps:
        return progress.phase
    parts = [f"{progress.phase}, step {progress.step} of {progress.total_steps}"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    if progress.accuracy is not None:
        parts.append(f"accuracy {progress.accuracy:.2f}")
    if progress.seconds_left is not None:
        parts.append(f"{progress.seconds_left:.0f} s left")
    return ", ".join(parts)


def _fifth(progress: TrainingProgress) -> int:
    return 5 * progress.step // progress.total_steps if progress.total_steps else 0
