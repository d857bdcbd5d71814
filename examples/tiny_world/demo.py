"""The whole of Ratchet once through, from nothing to a policy that is measurably better.

    python -m examples.tiny_world.demo [--seed 0] [--iterations 3] [--folder .ratchet/demo]

Builds the tiny world, starts the services as local processes, trains SFT and reward model from scratch (kept for the
next run), runs the iterations through the public APIs, and reports what the gold judge says: `report.html` and
`report.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
import tomllib
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean
from typing import Any

from rich.console import Console

from examples.tiny_world.files import BuiltWorld
from examples.tiny_world.judge import GoldJudge, win_rate
from examples.tiny_world.observers import MemorySampler, OutsideTraffic
from examples.tiny_world.report import (
    DemoReport,
    Example,
    IterationReport,
    print_report,
    write_html,
    write_json,
)
from ratchet.cli.watch import watch_run
from ratchet.client import RatchetClient
from ratchet.local.stack import LocalStack, StackSettings
from services.contracts.errors import JobFailed, RatchetError
from services.contracts.recipes import Recipe
from services.contracts.rollouts import Rollout
from services.contracts.runs import RunStatus, RunView
from services.contracts.training import (
    ImportModelJob,
    RewardModelConfig,
    RewardModelJob,
    SftConfig,
    SftJob,
    TrainingJob,
    TrainingProgress,
)

HERE = Path(__file__).parent
BUILD_SECONDS = 300.0
READY_SECONDS = 300.0
"""A cold machine imports torch in four processes at once."""
ENGINE_SECONDS = 600.0
"""The first policy starts vLLM."""
JOB_SECONDS = 900.0
PAGE = 500
SHOWN_METRICS = ("loss", "accuracy", "heldout_accuracy")
EXAMPLES_SHOWN = 5


@dataclass(frozen=True)
class Models:
    """Store checkpoints of the demo, and what each took to make (0 when it was there already)."""

    sft: str
    reward_model: str
    seconds: dict[str, float]


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; 0 when the run ended well, 1 with one clear message otherwise."""
    parser = argparse.ArgumentParser(description="Ratchet's demo: a tiny policy gets better in minutes.")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world, the models and the run (default 0)")
    parser.add_argument("--iterations", type=int, default=3, help="iterations of the loop (default 3)")
    parser.add_argument("--folder", type=Path, default=Path(".ratchet/demo"), help="where everything is kept")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        report = run_demo(options.folder, options.seed, options.iterations, console)
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


def run_demo(folder: Path, seed: int, iterations: int, console: Console) -> DemoReport:
    """Everything, from building the world to the written report. Raises RatchetError when a part fails."""
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    settings = tomllib.loads((HERE / "recipe.toml").read_text(encoding="utf-8"))
    stack = LocalStack(folder / "stack", StackSettings(environment=dict(settings["environment"])))
    step(console, "1/5", "starting Redis and the services, and building a world meanwhile")
    with stack, MemorySampler(stack) as memory:
        world = build_world(folder / f"world-{seed}", seed)
        stack.wait_ready(READY_SECONDS)
        with stack.client() as client, ThreadPoolExecutor(1) as background:
            step(console, "2/5", "SFT and reward model, from scratch (kept for the next run)")
            models = train_models(client, world, seed, settings, console, background)
            step(console, "3/5", f"{iterations} iterations of sample, score, pair, DPO, swap, evaluate, decide")
            recipe = make_recipe(client, world, seed, iterations, settings, models)
            run = client.create_run(recipe, id=f"tiny-world-{seed}-{uuid.uuid4().hex[:6]}").id
            with OutsideTraffic(client, read_prompts(world.prompts)[:20]) as traffic:
                view = watch_run(client, run)
            if view.status is not RunStatus.IDLE:
                detail = view.problem.detail if view.problem else f"the run is {view.status}"
                raise RatchetError(detail)
            step(console, "4/5", "asking the gold judge")
            rows, examples, heldout = judge_run(client, view, GoldJudge.from_seed(seed))
            policy = client.policy()
    step(console, "5/5", "report")
    report = DemoReport(
        seed=seed,
        seconds=time.monotonic() - started,
        peak_memory_bytes=memory.peak_bytes,
        vllm_starts=policy.engine_starts,
        swap_seconds=traffic.swap_seconds,
        heldout_prompts=heldout,
        setup_seconds=models.seconds,
        iterations=rows,
        examples=examples,
        traffic=traffic.result(),
    )
    write_json(report, folder / "report.json")
    write_html(report, folder / "report.html")
    return report


def build_world(out: Path, seed: int) -> BuiltWorld:
    """Build the world in a process of its own: this one stays small, without torch. Raises JobFailed."""
    command = [sys.executable, "-m", "examples.tiny_world.build", "--out", str(out), "--seed", str(seed)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    if built.returncode:
        raise JobFailed(f"the world could not be built: {built.stderr.strip().splitlines()[-1:] or built.returncode}")
    return BuiltWorld.under(out)


def step(console: Console, number: str, text: str) -> None:
    """Say what begins."""
    console.print(f"[bold cyan]{number}[/] {text}", highlight=False)


def train_models(
    client: RatchetClient,
    world: BuiltWorld,
    seed: int,
    settings: dict[str, Any],
    console: Console,
    background: ThreadPoolExecutor,
) -> Models:
    """Import the untrained base, train SFT on it and a reward model from that; all under names derived from content.

    vLLM starts with the SFT model while the reward model trains.
    """
    base_hash = content_hash(*sorted(world.base.glob("*")))
    base = f"models/tiny-base-{base_hash}"
    sft_config = SftConfig.model_validate({**settings["sft"], "seed": seed})
    rm_config = RewardModelConfig.model_validate({**settings["reward_model"], "seed": seed})
    sft_hash = content_hash(world.sft, extra=base_hash + sft_config.model_dump_json())
    rm_hash = content_hash(world.preferences, extra=sft_hash + rm_config.model_dump_json())
    sft, reward_model = f"models/tiny-sft-{sft_hash}", f"models/tiny-rm-{rm_hash}"
    seconds: dict[str, float] = {}

    def train(name: str, job: TrainingJob) -> None:
        began = time.monotonic()
        with console.status(f"    {name}") as status:
            result = client.wait_job(
                client.submit_job(job).id,
                lambda _, progress: status.update(f"    {name}: {told(progress)}" if progress else f"    {name}"),
                JOB_SECONDS,
            )
        seconds[name] = time.monotonic() - began
        figures = ", ".join(f"{key} {result.metrics[key]:.3g}" for key in SHOWN_METRICS if key in result.metrics)
        console.print(f"    {name}: {seconds[name]:.1f} s, {result.version}  {figures}", highlight=False)

    source = client.stage_model(world.base)
    train("import", ImportModelJob(model_kind="policy", source=f"store:{source}", output=base))
    sft_data = client.upload_dataset(world.sft, kind="any").path
    train("sft", SftJob(start=base, data=sft_data, config=sft_config, output=sft))
    engine = background.submit(client.set_policy, sft, timeout_seconds=ENGINE_SECONDS)
    train(
        "reward model",
        RewardModelJob(
            start=sft,
            data=client.upload_dataset(world.preferences, kind="any").path,
            heldout=client.upload_dataset(world.preferences_heldout, kind="any").path,
            config=rm_config,
            output=reward_model,
        ),
    )
    if not engine.done():
        console.print("    waiting for vLLM to start with the SFT model", highlight=False)
    engine.result()
    return Models(sft, reward_model, seconds)


def told(progress: TrainingProgress) -> str:
    """A training's progress in a few words."""
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


def make_recipe(
    client: RatchetClient, world: BuiltWorld, seed: int, iterations: int, settings: dict[str, Any], models: Models
) -> Recipe:
    """The run's recipe: `[run]` of recipe.toml with this world's models and prompts."""
    return Recipe.model_validate(
        {
            **settings["run"],
            "name": "tiny-world",
            "policy": models.sft,
            "reward_model": models.reward_model,
            "prompts": {"path": client.upload_dataset(world.prompts, kind="prompts").path},
            "heldout": {"path": client.upload_dataset(world.heldout, kind="prompts").path},
            "iterations": iterations,
            "seed": seed,
        }
    )


def judge_run(
    client: RatchetClient, view: RunView, judge: GoldJudge
) -> tuple[tuple[IterationReport, ...], tuple[Example, ...], int]:
    """Judge every iteration's held-out responses by the truth, against those of the SFT model to the same prompts."""
    records = [it.record for it in view.iterations if it.record is not None]
    answers = [heldout_rollouts(client, view.id, record.iteration) for record in records]
    utilities = [{key: gold_utilities(judge, rollout) for key, rollout in each.items()} for each in answers]
    keys = sorted(set.intersection(*(set(each) for each in utilities)))
    reference = [utilities[0][key] for key in keys]
    rows: list[IterationReport] = []
    for record, each in zip(records, utilities, strict=True):
        mine = [each[key] for key in keys]
        wins = win_rate(mine, reference)
        rows.append(
            IterationReport(
                name="SFT" if record.iteration == 0 else f"iter {record.iteration}",
                version=record.version,
                decision=record.decision,
                proxy_reward=record.metrics.proxy_reward or 0.0,
                gold_utility=mean([mean(each) for each in mine]),
                gold_win_rate=wins.rate,
                gold_win_rate_ci=(wins.low, wins.high),
                response_tokens=record.metrics.response_tokens or 0.0,
                kl=record.metrics.kl,
                seconds_by_stage=record.seconds_by_stage,
            )
        )
    last = max((i for i, r in enumerate(records) if r.decision == "promoted"), default=0)
    return tuple(rows), pick_examples(answers[0], answers[last], utilities[0], utilities[last]), len(keys)


def heldout_rollouts(client: RatchetClient, run: str, iteration: int) -> dict[str, Rollout]:
    """All held-out rollouts of an iteration, by prompt id."""
    found: dict[str, Rollout] = {}
    total = 1
    while len(found) < total:
        page = client.rollouts(run, iteration, evaluation=True, offset=len(found), limit=PAGE)
        if not page.rows:
            break
        total = page.total
        found.update((row.rollout.prompt_id, row.rollout) for row in page.rows)
    return found


def gold_utilities(judge: GoldJudge, rollout: Rollout) -> list[float]:
    """Gold utility of each of a prompt's responses."""
    return [judge.utility(rollout.messages[-1].content, response.text) for response in rollout.responses]


def pick_examples(
    before: dict[str, Rollout], after: dict[str, Rollout], was: dict[str, list[float]], now: dict[str, list[float]]
) -> tuple[Example, ...]:
    """A fair few: evenly spread over the prompts by how much the first answer changed, best and worst included."""
    keys = sorted(set(before) & set(after), key=lambda key: (now[key][0] - was[key][0], key))
    count = min(EXAMPLES_SHOWN, len(keys))
    spread = [keys[round(i * (len(keys) - 1) / max(1, count - 1))] for i in range(count)]
    return tuple(
        Example(
            prompt=before[key].messages[-1].content,
            before=before[key].responses[0].text,
            before_utility=was[key][0],
            after=after[key].responses[0].text,
            after_utility=now[key][0],
        )
        for key in reversed(spread)
    )


def read_prompts(path: Path) -> list[str]:
    """The texts of a prompts file made by `build`."""
    return [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").split("\n") if line]


def content_hash(*files: Path, extra: str = "") -> str:
    """Twelve hex digits that change when a file or `extra` does."""
    digest = hashlib.sha256(extra.encode())
    for file in files:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
