"""Runs and iterations: what is recorded, and what the API shows."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from services.contracts.judgements import Judgement
from services.contracts.model import Contract, Name
from services.contracts.problems import Problem
from services.contracts.recipes import Recipe, ResolvedModels
from services.contracts.rollouts import Rollout


class RunStatus(StrEnum):
    """What a run is doing. `idle` waits for more iterations to be triggered."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    IDLE = "idle"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Stage(StrEnum):
    """The stages of an iteration, in order. Iteration 0 is the baseline: import, evaluate, decide."""

    IMPORT = "import"
    PROMPTS = "prompts"
    SAMPLE = "sample"
    SCORE = "score"
    PAIR = "pair"
    TRAIN = "train"
    LOAD = "load"
    EVALUATE = "evaluate"
    EVALUATE_SCORE = "evaluate-score"
    DECIDE = "decide"


ShownIterations = Literal["all", "latest", "none"]
"""Which iterations a list of runs carries; all of 100 runs of 50 are 14 MB."""
Decision = Literal["baseline", "promoted", "rejected"]


class RunRecord(Contract):
    """`runs/{run}/run.json`: written once. Resolved recipe, seeds, versions of code and libraries."""

    id: Name
    created_at: str
    recipe: Recipe
    models: ResolvedModels
    prompts_total: int
    heldout_total: int
    skipped_lines: dict[str, int] = Field(default_factory=dict, description="Broken lines skipped, by file.")
    versions: dict[str, str] = Field(default_factory=dict)
    warnings: tuple[str, ...] = Field(default=(), description="What the creator should know, one sentence each.")


class Rollback(Contract):
    """The incumbent was set back by hand."""

    before_iteration: int = Field(description="It takes effect for this iteration and later ones.")
    to_iteration: int
    reason: str
    at: str


class RunControl(Contract):
    """`runs/{run}/control.json`: what people have asked of the run. Replaced atomically."""

    iterations: int = Field(description="Iterations asked for in all.")
    paused: bool = False
    cancelled: bool = False
    rollbacks: tuple[Rollback, ...] = ()


class PairedTest(Contract):
    """Candidate against incumbent on the same held-out prompts."""

    mean_difference: float
    standard_error: float
    p_value: float = Field(description="One-sided: probability of such a difference if the candidate were no better.")
    n: int


class IterationMetrics(Contract):
    """What is measured each iteration. Rewards are raw logits; lengths in tokens; KL in nats per response."""

    proxy_reward: float | None = Field(default=None, description="Mean reward of the candidate on held-out prompts.")
    proxy_reward_std: float | None = None
    incumbent_reward: float | None = None
    win_rate_vs_reference: float | None = Field(default=None, description="By reward, on held-out prompts, ties half.")
    win_rate_vs_incumbent: float | None = None
    kl: float | None = Field(default=None, description="Estimate of KL(policy || reference) from held-out responses.")
    response_tokens: float | None = Field(default=None, description="Mean length of held-out responses.")
    truncated_fraction: float | None = None
    sampled_reward_mean: float | None = Field(default=None, description="Over all sampled responses of the iteration.")
    sampled_reward_best: float | None = Field(
        default=None, description="Mean over prompts of the best response's reward."
    )
    sampled_reward_spread: float | None = Field(
        default=None, description="Mean over prompts of best minus worst reward."
    )
    reward_length_correlation: float | None = Field(default=None, description="Mean per-prompt Pearson correlation.")
    duplicate_fraction: float | None = Field(
        default=None, description="Sampled responses identical to an earlier one of the prompt."
    )
    sampled_truncated_fraction: float | None = None
    sampled_response_tokens: float | None = None
    sampled_tokens_per_second: float | None = None
    prompts: int | None = None
    responses: int | None = None
    pairs: int | None = None
    dropped: dict[str, int] = Field(
        default_factory=dict, description="Counted reasons for dropped prompts and responses."
    )
    dpo_loss: float | None = None
    dpo_accuracy: float | None = None
    dpo_margin: float | None = None


class IterationRecord(Contract):
    """`runs/{run}/iter-{t}/iteration.json`, written once when the gate has decided."""

    run_id: str
    iteration: int
    version: str = Field(description="Policy version of this iteration's checkpoint.")
    incumbent: str = Field(description="Version it was compared with (iteration 0: itself).")
    serving: str = Field(description="Version that serves after the decision.")
    decision: Decision
    reasons: tuple[str, ...] = Field(description="Why, one sentence per rule of the gate.")
    test: PairedTest | None = None
    metrics: IterationMetrics
    seconds_by_stage: dict[str, float] = Field(default_factory=dict, description="First job's start to last job's end.")
    decided_at: str


class StageView(Contract):
    """Live view of one stage of the current iteration."""

    stage: Stage
    state: Literal["waiting", "running", "succeeded", "failed"]
    done: int = Field(description="Finished jobs (chunks).")
    total: int
    items_done: int = Field(default=0, description="Finished prompts (or training steps), running jobs included.")
    items_total: int = 0
    tokens_per_second: float | None = None
    seconds: float | None = Field(default=None, description="Time since the stage began, or its whole time.")
    seconds_left: float | None = None
    detail: str | None = Field(default=None, description="Latest figures, e.g. loss and accuracy.")


class IterationView(Contract):
    """One iteration: live stages, and the record once it is decided."""

    iteration: int
    stages: tuple[StageView, ...]
    record: IterationRecord | None = None
    judgements: tuple[Judgement, ...] = Field(default=(), description="By the judge's name; only once it is decided.")


class RunView(Contract):
    """Answer of `GET /v1/runs/{id}`."""

    id: str
    status: RunStatus
    created_at: str
    recipe: Recipe
    iterations_asked: int
    iterations_decided: int
    incumbent: str | None = Field(description="Version the next iteration starts from.")
    iterations: tuple[IterationView, ...]
    problem: Problem | None = Field(default=None, description="Why the run failed, from the job that failed.")
    skipped_lines: dict[str, int] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class RunCreated(Contract):
    """Answer of `POST /v1/runs`."""

    id: str
    status: RunStatus
    warnings: tuple[str, ...] = Field(default=(), description="Reused prompts, dropped duplicates, …")


class RunRequest(Contract):
    """Body of `POST /v1/runs`."""

    recipe: Recipe
    id: Name | None = Field(
        default=None, description="Creating an id twice with the same recipe is one run; another recipe: 409."
    )


class IterationsRequest(Contract):
    """Body of `POST /v1/runs/{id}/iterations`: trigger the next `count` iterations."""

    count: int = Field(default=1, ge=1, le=1000)


class RollbackRequest(Contract):
    """Body of `POST /v1/runs/{id}/rollback`."""

    to_iteration: int = Field(ge=0)
    reason: str = Field(min_length=1, max_length=500)


class ScoredRollout(Contract):
    """A rollout with the rewards of its responses, once they are scored."""

    rollout: Rollout
    rewards: tuple[float, ...] | None = None


class RolloutPage(Contract):
    """Answer of `GET /v1/runs/{id}/iterations/{t}/rollouts`: what is published so far."""

    total: int
    offset: int
    rows: tuple[ScoredRollout, ...]


class DatasetInfo(Contract):
    """Answer of `POST /v1/datasets`: an uploaded file, content-addressed."""

    path: str = Field(description="Store path `datasets/{sha256}.jsonl` (or .parquet).")
    rows: int
    kind: Literal["prompts", "any"]
    skipped: tuple[str, ...] = Field(default=(), description="`line 17: …`, for every line skipped on request.")
    skipped_count: int = 0
