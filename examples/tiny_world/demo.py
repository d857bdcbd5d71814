"""The whole of Ratchet once through, from nothing to a policy that is measurably better.

    python -m examples.tiny_world.demo [--seed 0] [--iterations 3] [--small] [--folder .ratchet/demo]

Starts the services as local processes, builds the tiny world, trains SFT and reward model from scratch (kept for the
next run), runs the iterations through the public APIs, and reports what the gold judge says: `report.html` and
`report.json`. `examples.tiny_world.remote` is the same on a stack that runs already.
"""

from __future__ import annotations

import argparse
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

from examples.tiny_world.loop import build_world, play
from examples.tiny_world.observers import MemorySampler
from examples.tiny_world.progress import Progress
from examples.tiny_world.report import DemoReport, print_report, write_html, write_json
from examples.tiny_world.settings import TinyWorldSettings
from ratchet.cli import output
from ratchet.local.stack import LocalStack, StackSettings
from services.contracts.errors import RatchetError

READY_SECONDS = 300.0
"""A cold machine imports torch in four processes at once."""


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; 0 when the run ended well, 1 with one clear message otherwise."""
    parser = argparse.ArgumentParser(description="Ratchet's demo: a tiny policy gets better in minutes.")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world, the models and the run (default 0)")
    parser.add_argument("--iterations", type=int, default=3, help="iterations of the loop (default 3)")
    parser.add_argument("--folder", type=Path, default=Path(".ratchet/demo"), help="where everything is kept")
    parser.add_argument("--small", action="store_true", help="far smaller models and data: nothing is learned")
    options = parser.parse_args(arguments)
    console = output.out
    try:
        report = run_demo(options.folder, options.seed, options.iterations, Progress(console), small=options.small)
    except RatchetError as error:
        console.print(f"[bold red]the demo stopped:[/] {error.detail}", highlight=False, soft_wrap=True)
        console.print(f"Logs of the services: {options.folder / 'stack' / 'logs'}", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("\nstopped; nothing is left running. 'make demo' again goes on with the trained models.")
        return 130
    print_report(report, console)
    console.print(f"\nThe page: {options.folder / 'report.html'}   The figures: {options.folder / 'report.json'}")
    return 0


def run_demo(folder: Path, seed: int, iterations: int, progress: Progress, *, small: bool = False) -> DemoReport:
    """Everything, from building the world to the written report. Raises RatchetError when a part fails."""
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    settings = TinyWorldSettings.read(seed, small=small)
    stack = LocalStack(folder / "stack", StackSettings(environment=settings.environment))
    progress.step("1/5", "starting Redis and the services, and building a world meanwhile")
    with stack, MemorySampler(stack) as memory:
        world = build_world(folder, settings)
        stack.wait_ready(READY_SECONDS)
        run = f"tiny-world-{seed}-{uuid.uuid4().hex[:6]}"  # a new one each time; the models are those of before
        with stack.client() as client:
            played = play(client, world, settings, run, iterations, progress)
            policy = client.policy()
    report = replace(
        played,
        seconds=time.monotonic() - started,
        peak_memory_bytes=memory.peak_bytes,
        vllm_starts=policy.engine_starts,
    )
    write_json(report, folder / "report.json")
    write_html(report, folder / "report.html")
    return report


if __name__ == "__main__":
    sys.exit(main())
