"""The tiny world on a stack that is already running: `docker compose`, `ratchet up`, or services elsewhere.

    python -m examples.tiny_world.remote [--seed 0] [--iterations 3] [--run-id tiny-world] [--small] [--folder DIR]

Where the stack is, is read from the environment (RATCHET_URL, RATCHET_GENERATOR_URL, RATCHET_REWARD_URL,
RATCHET_TRAINER_URL, RATCHET_TOKEN, RATCHET_STORE_URL), or from the local stack's folder (--dir). Only the public APIs
are used, and the store to put the untrained model into. The second time, the models are those of the first, and a run
that is there already is followed rather than repeated.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console
from rich.text import Text

from examples.tiny_world.loop import build_world, play
from examples.tiny_world.progress import Progress
from examples.tiny_world.report import DemoReport, print_report, write_html, write_json
from examples.tiny_world.settings import TinyWorldSettings
from ratchet.cli import output
from ratchet.client import Connection, RatchetClient
from ratchet.client.connection import ALIAS, ENVIRONMENT
from services.contracts.errors import InvalidInput, RatchetError
from services.contracts.model import Name

RUN_ID = "tiny-world"
DEFAULT_FOLDER = Path(tempfile.gettempdir()) / "ratchet-tiny-world"
"""A container's working folder cannot be written to by its user; this can, everywhere."""


def main(arguments: list[str] | None = None, console: Console = output.out) -> int:
    """Command line entry; 0 when the run ended well, 1 with one clear line otherwise."""
    options = parse(arguments)
    try:
        report = run_remote(options, Progress(console))
    except RatchetError as error:
        where = f" ({error.field})" if error.field and error.field not in error.detail else ""
        output.err.print(
            Text.assemble(("error: ", "bold red"), f"{error.title}{where}: {error.detail}"), soft_wrap=True
        )
        return 1
    except OSError as error:
        output.err.print(Text.assemble(("error: ", "bold red"), f"{error}"), soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    print_report(report, console)
    save(report, options.folder, options.run_id, console)
    return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command's options. Exits with 2 and a message when one is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.tiny_world.remote",
        description="A tiny policy gets better in minutes, on a stack that is already running.",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the world, the models and the run (default 0)")
    parser.add_argument("--iterations", type=_positive, default=3, help="iterations in all (default 3)")
    parser.add_argument("--run-id", type=_run_id, default=RUN_ID, help=f"name of the run (default {RUN_ID})")
    parser.add_argument(
        "--small", action="store_true", help="far smaller models and data: seconds, and nothing learned"
    )
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="for data and report (default %(default)s)")
    parser.add_argument("--dir", type=Path, default=Path(".ratchet"), help="of the local stack, if no URL is set")
    return parser.parse_args(arguments)


def run_remote(options: argparse.Namespace, progress: Progress) -> DemoReport:
    """Everything, from finding the stack to the judged run. Raises RatchetError when a part fails."""
    started = time.monotonic()
    connection = Connection.find(options.dir)
    check(connection)
    settings = TinyWorldSettings.read(options.seed, small=options.small)
    options.folder.mkdir(parents=True, exist_ok=True)
    with RatchetClient.of(connection) as client:
        for answers in (client.runs, client.policy, client.scorers, client.jobs):
            answers()  # a stack that cannot be reached is told before a world is built for it
        progress.step("1/5", f"building a world; the stack is {connection.orchestrator}")
        world = build_world(options.folder, settings)
        played = play(client, world, settings, options.run_id, options.iterations, progress)
    return replace(played, seconds=time.monotonic() - started)


def check(connection: Connection) -> None:
    """Whether everything is named that is needed. Raises InvalidInput or Unauthorized that name what is missing."""
    missing = [
        ALIAS if name == "orchestrator" else variable
        for name, variable in ENVIRONMENT.items()
        if getattr(connection, name) is None
    ]
    if connection.store_url is None:
        missing.append("RATCHET_STORE_URL")
    if missing:
        raise InvalidInput(
            f"the tiny world needs all four services and the store, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set",
            field=missing[0],
        )
    connection.require_token("playing the tiny world")


def save(report: DemoReport, folder: Path, run_id: str, console: Console) -> None:
    """Write the report, as a page too where matplotlib is installed; say where, and where the run itself is seen."""
    write_json(report, folder / "report.json")
    said = f"The figures: {folder / 'report.json'}"
    if importlib.util.find_spec("matplotlib") is not None:
        write_html(report, folder / "report.html")
        said = f"The page: {folder / 'report.html'}   {said}"
    console.print(
        f"\n{said}\nThe run, pair by pair: {run_id} in the orchestrator's dashboard, or 'ratchet show {run_id}'",
        soft_wrap=True,
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} iterations: at least 1")
    return number


def _run_id(text: str) -> str:
    try:
        return TypeAdapter(Name).validate_python(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: a run's name is letters, digits, '.', '_' and '-', at most 100, a letter or digit first"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
