"""The steps that both ways of playing the tiny world share: `demo` on a stack of its own, `remote` on a running one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from examples.tiny_world.files import BuiltWorld
from examples.tiny_world.judge import GoldJudge
from examples.tiny_world.judging import GoldJudging, iteration_reports, pick_examples
from examples.tiny_world.observers import OutsideTraffic
from examples.tiny_world.progress import Progress
from examples.tiny_world.report import DemoReport
from examples.tiny_world.settings import TinyWorldSettings
from examples.tiny_world.training import Models, train_models
from ratchet.cli.watch import watch_run
from ratchet.client import RatchetClient
from services.contracts.errors import Conflict, JobFailed, NotFound
from services.contracts.recipes import Recipe
from services.contracts.runs import RunStatus, RunView

BUILD_SECONDS = 300.0
TRAFFIC_PROMPTS = 20


def build_world(folder: Path, settings: TinyWorldSettings) -> BuiltWorld:
    """Build the world in a process of its own: this one stays small, without torch. Raises JobFailed."""
    out = folder / settings.world_name
    command = [sys.executable, "-m", "examples.tiny_world.build", "--out", str(out), "--seed", str(settings.seed)]
    command += ["--small"] if settings.small else []
    built = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    if built.returncode:
        raise JobFailed(f"the world could not be built: {built.stderr.strip().splitlines()[-1:] or built.returncode}")
    return BuiltWorld.under(out)


def play(
    client: RatchetClient,
    world: BuiltWorld,
    settings: TinyWorldSettings,
    run: str,
    iterations: int,
    progress: Progress,
) -> DemoReport:
    """Train what is not there, run the iterations, judge each as it is decided, and report.

    Raises:
        Conflict: a run of this name exists with another recipe.
        RatchetError: a part failed; the message says which and why.
    """
    began = time.monotonic()
    models = Models.of(world, settings)
    recipe = make_recipe(client, world, settings, models, iterations)
    known = find_run(client, run, recipe)
    if known is None:
        progress.step("2/5", "SFT and reward model, from scratch (kept for the next run)")
        setup_seconds = train_models(client, world, models, settings, progress)
        progress.step("3/5", f"{iterations} iterations of sample, score, pair, DPO, swap, evaluate, decide; run {run}")
        client.create_run(recipe, id=run)
    else:
        setup_seconds: dict[str, float] = {}
        progress.step("2/5", f"run {run} is there already, and so are its models; nothing is trained or run again")
        progress.step("3/5", continue_run(client, known, iterations))
    judging = GoldJudging(client, run, GoldJudge.from_seed(settings.seed), progress)
    with judging, OutsideTraffic(client, read_prompts(world.prompts)[:TRAFFIC_PROMPTS]) as traffic:
        view = watch_run(client, run)
    if view.status is not RunStatus.IDLE:
        raise JobFailed(view.problem.detail if view.problem else f"run {run} is {view.status}")
    progress.step("4/5", "asking the gold judge about what it has not judged yet")
    judged = judging.finish()
    progress.step("5/5", "report")
    return DemoReport(
        seed=settings.seed,
        seconds=time.monotonic() - began,
        peak_memory_bytes=None,
        vllm_starts=None,
        swap_seconds=traffic.swap_seconds,
        heldout_prompts=min(each.prompts for each in judged),
        setup_seconds=setup_seconds,
        iterations=iteration_reports(judged),
        examples=pick_examples(judged),
        traffic=traffic.result(),
    )


def make_recipe(
    client: RatchetClient, world: BuiltWorld, settings: TinyWorldSettings, models: Models, iterations: int
) -> Recipe:
    """The run's recipe: `[run]` of the settings with this world's models and prompts."""
    return Recipe.model_validate(
        {
            **settings.run,
            "name": "tiny-world",
            "policy": models.sft,
            "reward_model": models.reward_model,
            "prompts": {"path": client.upload_dataset(world.prompts, kind="prompts").path},
            "heldout": {"path": client.upload_dataset(world.heldout, kind="prompts").path},
            "iterations": iterations,
            "seed": settings.seed,
        }
    )


def find_run(client: RatchetClient, run: str, recipe: Recipe) -> RunView | None:
    """The run of this name, if it is there. Raises Conflict when it is another one."""
    try:
        known = client.run(run)
    except NotFound:
        return None
    if known.recipe.model_copy(update={"iterations": recipe.iterations}) != recipe:
        raise Conflict(
            f"run {run!r} exists with another recipe (its seed is {known.recipe.seed}, its policy "
            f"{known.recipe.policy}). Give this one another name with --run-id, or the seed and size of that one",
            field="run-id",
        )
    return known


def continue_run(client: RatchetClient, known: RunView, iterations: int) -> str:
    """Have a known run reach this many iterations; returns what that means, in a sentence."""
    going_on = known.status in (RunStatus.PAUSED, RunStatus.FAILED, RunStatus.CANCELLED)
    if going_on:
        client.resume(known.id)
    missing = iterations - known.iterations_asked
    if missing > 0:
        client.trigger(known.id, missing)
        return f"{missing} more iterations of it, to make {iterations}"
    if going_on:
        return f"it was {known.status.value}, and goes on"
    if known.status is RunStatus.IDLE:
        more = known.iterations_asked + 1
        return f"it has ended: {known.iterations_decided} iterations. More: --iterations {more}. Anew: --run-id NAME"
    return f"it is {known.status.value}; following it"


def read_prompts(path: Path) -> list[str]:
    """The texts of a prompts file made by `build`."""
    return [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").split("\n") if line]
