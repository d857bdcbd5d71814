"""Making a run: everything a recipe names is looked up, read and fixed in the store before the run exists."""

from __future__ import annotations

import asyncio
import json
import platform
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

from services.contracts import layout
from services.contracts.conversations import Prompt
from services.contracts.errors import Conflict, InvalidInput, RatchetError
from services.contracts.recipes import Recipe, ResolvedModels
from services.contracts.runs import RunControl, RunRecord, RunRequest
from services.contracts.trackers import InstalledTrackers, check_trackers
from services.orchestrator.clock import now_iso
from services.orchestrator.datasets import read_source
from services.orchestrator.models import resolve_models
from services.orchestrator.runbook import Runbook
from services.platform.http import ServiceClient
from services.platform.store import ArtifactStore
from services.platform.tables import to_parquet
from services.platform.urls import without_password

TAKEN_NAMES = {
    "models": "the store's folder of models",
    layout.ALL_RUNS: "the name of the events of all runs",
}
"""Ids no run may have. A run `models` would have policies of version `models/iter-1`, as a model named iter-1."""
LIBRARIES = ("ratchet-rlhf", "fastapi", "pydantic", "pyarrow", "redis")


def create_run(runbook: Runbook, request: RunRequest, told: Sequence[str] = ()) -> tuple[RunRecord, bool]:
    """Create a run, or find it: the same id with the same recipe is one run. Returns whether it is new.

    `run.json` is written last; without it the run does not exist.

    Args:
        told: Warnings that the run begins with.

    Raises:
        InvalidInput: the recipe names something that is not there or cannot be used; the field says what.
        Conflict: the id is taken by a run with another recipe.
    """
    recipe, store = request.recipe, runbook.store
    run = request.id or f"{recipe.name[:60]}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    if run in TAKEN_NAMES:
        raise InvalidInput(
            f"a run cannot be called {run!r}, which is {TAKEN_NAMES[run]}; choose another id", field="id"
        )
    if store.exists(layout.run_file(run)):
        known = runbook.record(run)
        if known.recipe != recipe:
            raise Conflict(f"run {run!r} exists with another recipe; choose another id", field="id")
        return known, False
    models = resolve_models(recipe, store)
    _check_lengths(recipe, models, store)
    pool = read_source(store, recipe.prompts, "recipe.prompts")
    heldout = read_source(store, recipe.heldout, "recipe.heldout")
    warnings = list(told)
    kept_heldout = _unique(heldout.rows, "held-out", warnings)[: recipe.evaluation.max_prompts]
    kept_pool = _without(_unique(pool.rows, "training", warnings), kept_heldout, warnings)
    _check_sizes(recipe, len(kept_pool), len(kept_heldout), warnings)
    _fix(store, layout.pool_file(run), kept_pool)
    _fix(store, layout.heldout_file(run), kept_heldout)
    skipped = {
        source.path: reading.skipped_count
        for source, reading in ((recipe.prompts, pool), (recipe.heldout, heldout))
        if reading.skipped_count
    }
    record = RunRecord(
        id=run, created_at=now_iso(), recipe=recipe, models=models, prompts_total=len(kept_pool),
        heldout_total=len(kept_heldout), skipped_lines=skipped, versions=_versions(), warnings=tuple(warnings),
    )  # fmt: skip
    store.publish_model(layout.run_file(run), record)
    runbook.write_control(run, RunControl(iterations=recipe.iterations))
    return runbook.record(run), True


async def check_report_to(
    runbook: Runbook, request: RunRequest, trainer: ServiceClient | None, seconds: float
) -> tuple[str, ...]:
    """A tracker the trainer does not have is told now, not after an iteration was sampled and scored.

    A run that exists is no business of it: creating it again finds it.

    Args:
        trainer: Its client, when its URL is known.
        seconds: Deadline of its answer.

    Returns:
        A warning when the trainer cannot be asked: it may be up by the time it has to train.

    Raises:
        InvalidInput: naming the trackers and how the trainer gets them.
    """
    names, field = request.recipe.dpo.report_to, "recipe.dpo.report_to"
    if not names or (request.id and await asyncio.to_thread(runbook.store.exists, layout.run_file(request.id))):
        return ()
    if trainer is None:
        why = "RATCHET_TRAINER_URL is not set at the orchestrator"
    else:
        try:
            async with asyncio.timeout(seconds):
                answer = await trainer.call("GET", "/v1/trackers", answer=InstalledTrackers, timeout_seconds=seconds)
        except TimeoutError:
            why = f"the trainer at {without_password(trainer.base_url)} did not answer within {seconds:g} s"
        except RatchetError as error:
            why = error.detail
        else:
            check_trackers(names, answer.trackers, field)
            return ()
    return (f"{field} names {', '.join(names)}, and whether the trainer has them is not known: {why}",)


def _check_lengths(recipe: Recipe, models: ResolvedModels, store: ArtifactStore) -> None:
    """A length the policy cannot take is told now, not after an iteration was sampled and scored."""
    if models.policy_import is not None:
        return  # its configuration is not here yet; the training job checks it
    config: dict[str, object] = json.loads(store.read_bytes(f"{models.policy}/config.json"))
    longest = config.get("max_position_embeddings")
    if isinstance(longest, int) and recipe.dpo.max_length > longest:
        raise InvalidInput(
            f"dpo.max_length is {recipe.dpo.max_length} and the policy {models.policy} has {longest} positions; "
            f"at most {longest}",
            field="recipe.dpo.max_length",
        )


def _unique(prompts: tuple[Prompt, ...], what: str, warnings: list[str]) -> list[Prompt]:
    unique = list({prompt.id: prompt for prompt in prompts}.values())
    if len(unique) < len(prompts):
        warnings.append(
            f"{len(prompts) - len(unique)} of {len(prompts)} {what} prompts occur more than once; each is used once"
        )
    return unique


def _without(pool: list[Prompt], heldout: list[Prompt], warnings: list[str]) -> list[Prompt]:
    judged = {prompt.id for prompt in heldout}
    kept = [prompt for prompt in pool if prompt.id not in judged]
    if len(kept) < len(pool):
        warnings.append(
            f"{len(pool) - len(kept)} training prompts are among the held-out prompts that judge the policy; "
            "they are not trained on"
        )
    return kept


def _check_sizes(recipe: Recipe, pool: int, heldout: int, warnings: list[str]) -> None:
    each = recipe.sampling.prompts_per_iteration
    if pool < each:
        raise InvalidInput(
            f"an iteration draws {each} prompts and the pool has {pool}; "
            "lower sampling.prompts_per_iteration or give more prompts",
            field="recipe.sampling.prompts_per_iteration",
        )
    if heldout < 2:
        raise InvalidInput(
            f"the gate's paired test needs at least 2 held-out prompts, and there is {heldout}",
            field="recipe.heldout.path",
        )
    if pool < each * recipe.iterations:
        warnings.append(
            f"{recipe.iterations} iterations of {each} prompts need {each * recipe.iterations}, and the pool has "
            f"{pool}: later iterations use prompts again, in a new order"
        )
    evaluation = recipe.evaluation
    if evaluation.measure_kl and (evaluation.temperature != 1.0 or evaluation.top_p != 1.0):
        warnings.append(
            f"KL is estimated from responses drawn at temperature {evaluation.temperature:g}, top_p "
            f"{evaluation.top_p:g}; it is unbiased at 1 and 1 only"
        )


def _fix(store: ArtifactStore, path: str, prompts: list[Prompt]) -> None:
    data = to_parquet(prompts, Prompt)
    if not store.publish_bytes(path, data) and store.read_bytes(path) != data:
        raise Conflict(
            f"{path} is left over from another recipe whose run was never finished being created; choose another id",
            field="id",
        )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
