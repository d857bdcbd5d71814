"""`ratchet up`, `down`, `status`, `logs`: the stack on this machine."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ratchet.cli import output
from ratchet.cli.output import note, print_line

if TYPE_CHECKING:
    from ratchet.local.health import ProcessStatus
    from ratchet.local.stack import LocalStack

Dir = Annotated[
    Path, typer.Option("--dir", envvar="RATCHET_DIR", help="Folder of the stack's state.", show_default=True)
]
WATCH_SECONDS = 1.0
"""How often the foreground `up` looks whether a process died."""
FOLLOW_SECONDS = 0.25


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    panel = "Stack on this machine"
    app.command(rich_help_panel=panel)(up)
    app.command(rich_help_panel=panel)(down)
    app.command(rich_help_panel=panel)(status)
    app.command(rich_help_panel=panel)(logs)
    app.command(rich_help_panel=panel)(restart)


def up(
    folder: Dir = Path(".ratchet"),
    store: Annotated[str | None, typer.Option(help="Artifact store: folder or fsspec URL. Default: DIR/store.")] = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return once all is ready; 'ratchet down' stops it.")
    ] = False,
    services: Annotated[
        str, typer.Option(help="Which services to run, by comma.")
    ] = "generator,reward,trainer,orchestrator",
    host: Annotated[str, typer.Option(help="Address the services listen on.")] = "127.0.0.1",
    generator_port: Annotated[int | None, typer.Option(help="Default: a free port, as for all.")] = None,
    reward_port: Annotated[int | None, typer.Option()] = None,
    trainer_port: Annotated[int | None, typer.Option()] = None,
    orchestrator_port: Annotated[int | None, typer.Option()] = None,
    redis_port: Annotated[int | None, typer.Option()] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Variable for every service; repeatable.")
    ] = None,
    wait: Annotated[float, typer.Option(help="Seconds to wait until all are ready.", min=1)] = 180.0,
) -> None:
    """Start Redis and the four services here, and wait until they are ready.

    In the foreground, Ctrl-C stops everything. A generator without a policy counts as up: a run brings its own.

    Example: ratchet up -d --set RATCHET_GENERATOR_DTYPE=float32
    """
    from ratchet.local.settings import StackSettings, parse_assignments
    from ratchet.local.stack import LocalStack

    given = {
        "generator": generator_port, "reward": reward_port, "trainer": trainer_port,
        "orchestrator": orchestrator_port, "redis": redis_port,
    }  # fmt: skip
    stack = LocalStack(
        folder,
        StackSettings(
            services=tuple(name.strip() for name in services.split(",") if name.strip()),
            host=host,
            ports={name: port for name, port in given.items() if port is not None},
            store=store,
            environment=parse_assignments(settings or []),
        ),
    )
    with _interruptible():
        stack.start(detached=detach)
        try:
            _wait(stack, wait)
            _show_urls(stack)
            if detach:
                stack.release()
                note(
                    f"Running in the background. 'ratchet status' shows it, 'ratchet down' stops it.{dir_hint(folder)}"
                )
                return
            note("Ctrl-C stops everything.")
            _watch(stack)
        except KeyboardInterrupt:
            note("stopping ...")
        finally:
            if not stack.released:
                # A second Ctrl-C must not leave half a stack; stopping is bounded in time.
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_IGN)
                stack.stop()
        note("stopped; nothing is left running")


def down(folder: Dir = Path(".ratchet")) -> None:
    """Stop the stack, wait until it has ended, and verify that nothing is left. Stopping a stopped one is fine.

    Example: ratchet down
    """
    from ratchet.local.records import StackFolder
    from ratchet.local.stack import LocalStack

    stack = LocalStack(folder)
    was_running = StackFolder(folder).running
    if was_running:
        note("stopping ...")
    stack.stop()
    note("stopped; nothing is left running" if was_running else f"no stack is running in {folder}")


def status(
    folder: Dir = Path(".ratchet"),
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show each process: state, pid, uptime, memory, URL. Exit code 0 only when all are healthy.

    Example: ratchet status --json
    """
    import dataclasses

    from ratchet.local.stack import LocalStack

    stack = LocalStack.attach(folder)
    statuses = stack.status()
    memory = {usage.name: usage.pss_bytes for usage in stack.processes()}
    if as_json:
        rows = [
            {**dataclasses.asdict(s), "uptime_seconds": s.uptime_seconds, "pss_bytes": memory.get(s.name), "up": s.up}
            for s in statuses
        ]
        output.print_json({"folder": str(stack.files.path), "healthy": all(s.up for s in statuses), "processes": rows})
    else:
        made = output.table(
            "process", "state", "pid", "uptime", "memory", "url", "detail", right=("pid", "uptime", "memory")
        )
        for s in statuses:
            made.add_row(
                s.name, output.state(s.state), str(s.pid or "-"), output.seconds(s.uptime_seconds),
                output.size(memory[s.name]) if s.name in memory else "-", s.url or "-", Text(s.detail),
            )  # fmt: skip
        output.print_table(made)
        for s in statuses:
            if s.state in ("failed", "restarting"):
                note(stack.failure(s))
    if not all(s.up for s in statuses):
        raise typer.Exit(1)


def logs(
    service: Annotated[
        str | None, typer.Argument(help="generator, reward, trainer, orchestrator or redis; default: all.")
    ] = None,
    folder: Dir = Path(".ratchet"),
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing what is added.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Lines from the end of each log.")] = 50,
) -> None:
    """Print the logs of one or all services (also after the stack has stopped).

    Example: ratchet logs generator -f
    """
    from ratchet.local.records import REDIS, SERVICES, StackFolder
    from ratchet.local.supervision import last_lines
    from services.contracts.errors import NotFound

    folder_logs = StackFolder(folder).logs
    names = [service] if service else [n for n in (REDIS, *SERVICES) if (folder_logs / f"{n}.log").exists()]
    files = {name: folder_logs / f"{name}.log" for name in names}
    if not files or not all(file.exists() for file in files.values()):
        there = ", ".join(sorted(file.stem for file in folder_logs.glob("*.log"))) or "none"
        raise NotFound(f"{folder_logs} has no log of {service or 'any service'}; there are: {there}", field="service")
    for name, file in files.items():
        for line in last_lines(file, lines):
            _log_line(name if len(files) > 1 else None, line)
    if follow:
        _follow(files)


def restart(
    service: Annotated[str, typer.Argument(help="generator, reward, trainer, orchestrator or redis.")],
    folder: Dir = Path(".ratchet"),
    wait: Annotated[float, typer.Option(help="Seconds to wait until it is ready.", min=1)] = 180.0,
) -> None:
    """Stop one service in order and start it again.

    Example: ratchet restart generator
    """
    from ratchet.local.stack import LocalStack

    stack = LocalStack.attach(folder)
    stack.restart(service)
    _wait(stack, wait, only=service)


def _wait(stack: LocalStack, wait: float, only: str | None = None) -> None:
    """Wait for readiness: a live table on a terminal, a line per change elsewhere."""
    began = time.monotonic()
    said: dict[str, str] = {}

    def lines(statuses: tuple[ProcessStatus, ...]) -> None:
        for s in statuses:
            if said.get(s.name) != s.state and (only is None or s.name == only):
                said[s.name] = s.state
                note(f"{time.monotonic() - began:5.1f} s  {s.name:<12} {s.state:<10} {s.detail}")

    names = [only] if only else None
    if not output.err.is_terminal:
        stack.wait_ready(wait, on_status=lines, only=names)
        return
    with Live(console=output.err, refresh_per_second=8, transient=False) as live:
        stack.wait_ready(wait, only=names, on_status=lambda statuses: live.update(_waiting_table(statuses, began)))


def _waiting_table(statuses: tuple[ProcessStatus, ...], began: float) -> Table:
    made = output.table("service", "state", "seconds", "detail", right=("seconds",))
    for s in statuses:
        made.add_row(
            s.name, output.state(s.state), f"{time.monotonic() - began:.0f}" if not s.up else "", Text(s.detail)
        )
    return made


def _show_urls(stack: LocalStack) -> None:
    made = output.table("service", "url")
    for process in stack.record.processes:
        made.add_row(process.name, process.url or "-")
    output.print_table(made)
    print_line(f"store  {stack.record.store_url}")
    print_line(f"token  {stack.files.token_file}")


def _watch(stack: LocalStack) -> None:
    """Report every death until interrupted, or until the stack ends by another's hand."""
    known = len(stack.deaths())
    while stack.files.running:
        found = stack.deaths()
        for death in found[known:]:
            status = next(s for s in stack.status() if s.name == death.name)
            note(f"{time.strftime('%H:%M:%S', time.localtime(death.at))}  {stack.failure(status)}")
        known = len(found)
        time.sleep(WATCH_SECONDS)
    note("the stack was stopped from elsewhere")


def _follow(files: dict[str, Path]) -> None:
    """Print what is added, also across rotation."""
    places = {name: file.stat().st_size for name, file in files.items()}
    with _quiet_interrupt():
        while True:
            for name, file in files.items():
                try:
                    length = file.stat().st_size
                    start = places[name] if length >= places[name] else 0
                    with file.open("rb") as handle:
                        handle.seek(start)
                        added = handle.read()
                except FileNotFoundError:
                    continue
                whole = added[: added.rfind(b"\n") + 1]
                places[name] = start + len(whole)
                for line in whole.decode(errors="replace").splitlines():
                    _log_line(name if len(files) > 1 else None, line)
            time.sleep(FOLLOW_SECONDS)


def _log_line(name: str | None, line: str) -> None:
    sys.stdout.write(f"{name:<12} | {line}\n" if name else f"{line}\n")
    sys.stdout.flush()


def dir_hint(folder: Path) -> str:
    """What to add to a command when the stack is not in the usual folder."""
    return "" if folder == Path(".ratchet") else f" (with --dir {folder})"


@contextmanager
def _quiet_interrupt() -> Iterator[None]:
    with suppress(KeyboardInterrupt):
        yield


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP stop a foreground stack as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    old = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
