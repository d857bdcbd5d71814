"""The jobs of a run, by name: ids are derived from what a job does, and so is where its output goes."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pydantic import Field

from services.contracts import layout
from services.contracts.model import Contract, Name, StorePath
from services.contracts.runs import RunRecord, Stage

IMPORT_POLICY, IMPORT_REWARD_MODEL = 0, 1
"""Chunk numbers of the two import jobs of iteration 0."""
CHUNKED = frozenset({Stage.SAMPLE, Stage.SCORE, Stage.EVALUATE, Stage.EVALUATE_SCORE, Stage.IMPORT})
QUEUES = {
    Stage.IMPORT: "train",
    Stage.PROMPTS: "control",
    Stage.SAMPLE: "generate",
    Stage.SCORE: "score",
    Stage.PAIR: "control",
    Stage.TRAIN: "train",
    Stage.LOAD: "control",
    Stage.EVALUATE: "generate",
    Stage.EVALUATE_SCORE: "score",
    Stage.DECIDE: "control",
}
BASELINE_STAGES = (Stage.IMPORT, Stage.EVALUATE, Stage.EVALUATE_SCORE, Stage.DECIDE)
ITERATION_STAGES = tuple(stage for stage in Stage if stage is not Stage.IMPORT)
ROLLBACK_KIND = "rollback"


class StageJob(Contract):
    """Payload of the orchestrator's own jobs. The stage is the job's kind."""

    run: Name
    iteration: int = Field(ge=0)
    chunk: int = Field(default=0, ge=0)
    policy: StorePath | None = Field(
        default=None, description="Checkpoint that must answer (sample, evaluate, load, …)."
    )
    incumbent: int | None = Field(default=None, description="Iteration whose checkpoint is the incumbent (decide).")


def stages_of(iteration: int) -> tuple[Stage, ...]:
    """Stages of an iteration, in order; iteration 0 is the baseline."""
    return ITERATION_STAGES if iteration > 0 else BASELINE_STAGES


def job_id(run: str, iteration: int, stage: Stage, chunk: int | None = None) -> str:
    """`{run}/iter-{t}/{stage}` or, for stages cut into chunks, `{run}/iter-{t}/{stage}/{chunk:05d}`."""
    if (stage in CHUNKED) != (chunk is not None):
        raise ValueError(f"stage {stage} {'needs a' if stage in CHUNKED else 'has no'} chunk")
    suffix = "" if chunk is None else f"/{chunk:05d}"
    return f"{run}/iter-{iteration}/{stage}{suffix}"


def rollback_id(run: str, number: int) -> str:
    """The job that makes the generator serve what a person rolled back to; `number` counts the run's rollbacks."""
    return f"{run}/rollback/{number:05d}"


def chunks_of(record: RunRecord, stage: Stage) -> tuple[int, ...]:
    """Chunk numbers of a chunked stage."""
    if stage is Stage.IMPORT:
        imports = (
            (IMPORT_POLICY, record.models.policy_import),
            (IMPORT_REWARD_MODEL, record.models.reward_model_import),
        )
        return tuple(chunk for chunk, source in imports if source is not None)
    recipe = record.recipe
    if stage in (Stage.SAMPLE, Stage.SCORE):
        return tuple(range(math.ceil(recipe.sampling.prompts_per_iteration / recipe.sampling.chunk_size)))
    return tuple(range(math.ceil(record.heldout_total / recipe.evaluation.chunk_size)))


def stage_ids(record: RunRecord, iteration: int, stage: Stage) -> tuple[str, ...]:
    """Ids of all jobs of a stage."""
    if stage in CHUNKED:
        return tuple(job_id(record.id, iteration, stage, chunk) for chunk in chunks_of(record, stage))
    return (job_id(record.id, iteration, stage),)


def iteration_ids(record: RunRecord, iteration: int) -> Iterator[str]:
    """Ids of all jobs of an iteration, in the order of its stages."""
    for stage in stages_of(iteration):
        yield from stage_ids(record, iteration, stage)


def policy_folder(record: RunRecord, iteration: int) -> str:
    """Checkpoint folder of an iteration's policy; iteration 0 is the initial policy, the fixed reference."""
    return layout.checkpoint_folder(record.id, iteration) if iteration > 0 else record.models.policy


def policy_version(record: RunRecord, iteration: int) -> str:
    """Version of an iteration's policy, as its manifest and every answer name it."""
    return layout.version_of(policy_folder(record, iteration))
