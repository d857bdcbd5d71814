"""What the terminal shows: text for people, JSON for scripts, errors as one clear message."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

if TYPE_CHECKING:
    from pydantic import BaseModel

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)

STATE_STYLES = {
    "ready": "green",
    "waiting": "cyan", "starting": "yellow", "restarting": "yellow", "unready": "red", "failed": "red",
    "not_ready": "yellow", "unreachable": "red",
    "stopped": "dim", "running": "green", "succeeded": "green", "queued": "cyan", "paused": "yellow", "idle": "cyan",
    "cancelled": "dim", "promoted": "green", "rejected": "yellow", "baseline": "cyan",
}  # fmt: skip


class RatchetGroup(TyperGroup):
    """A command group in which an error of ours is one message and exit code 1, and Ctrl-C is exit code 130."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        from services.contracts.errors import RatchetError

        try:
            return super().invoke(ctx)
        except RatchetError as error:
            show_error(error.title, error.detail, error.field)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(130) from error
        except BrokenPipeError as error:  # `ratchet runs | head`
            sys.stderr.close()
            raise typer.Exit(0) from error


def show_error(title: str, detail: str, field: str | None = None) -> None:
    """An error on stderr. Text from the services may hold brackets, so it is never read as markup."""
    where = f" ({field})" if field and field not in detail else ""
    err.print(Text.assemble(("error: ", "bold red"), f"{title}{where}: {detail}"), soft_wrap=True)


def note(message: str) -> None:
    """A remark on stderr, so that stdout stays what a script reads."""
    err.print(Text(message), soft_wrap=True)


def print_line(message: str | Text = "") -> None:
    """A line on stdout, never wrapped when piped and never read as markup."""
    out.print(Text(message) if isinstance(message, str) else message, soft_wrap=not out.is_terminal)


def print_json(value: BaseModel | list[Any] | dict[str, Any]) -> None:
    """A contract (or several) as JSON on stdout."""
    if isinstance(value, list):
        data: Any = [item.model_dump(mode="json") if hasattr(item, "model_dump") else item for item in value]
    else:
        data = value if isinstance(value, dict) else value.model_dump(mode="json")
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def table(*columns: str, right: tuple[str, ...] = (), title: str | None = None) -> Table:
    """A table without boxes: columns line up, also in a file."""
    made = Table(box=None, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0), title=title, title_justify="left",
                 header_style="bold")  # fmt: skip
    for column in columns:
        made.add_column(
            column, justify="right" if column in right else "left", no_wrap=column != "detail", overflow="fold"
        )
    return made


def print_table(made: Table) -> None:
    """A table as wide as the terminal; in a file or pipe as wide as it needs."""
    if out.is_terminal:
        out.print(made)
    else:
        wide = Console(file=sys.stdout, width=400, highlight=False, no_color=True)
        with wide.capture() as captured:
            wide.print(made)
        sys.stdout.write("\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n")


def state(name: str) -> Text:
    """A state in its colour."""
    return Text(name, style=STATE_STYLES.get(name, ""))


def seconds(value: float | None) -> str:
    """A span of time: `8 s`, `3 min 20 s`, `2 h 05 min`."""
    if value is None:
        return "-"
    if value < 60:
        return f"{value:.1f} s" if value < 9.95 else f"{value:.0f} s"
    if value < 3600:
        return f"{int(value) // 60} min {int(value) % 60:02d} s"
    return f"{int(value) // 3600} h {int(value) % 3600 // 60:02d} min"


def size(value: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{value / 2**20:.0f} MiB" if value < 2**30 else f"{value / 2**30:.1f} GiB"


def number(value: float | None, digits: int = 3) -> str:
    """A figure, or `-` when it was not measured."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A fraction as percent."""
    return "-" if value is None else f"{value * 100:.0f} %"
