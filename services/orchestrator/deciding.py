"""Job handlers that put a candidate on trial, judge it on the held-out prompts, and promote or reject it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from services.contracts import layout
from services.contracts.errors import JobFailed, NotFound, StoreError
from services.contracts.rollouts import Rollout
from services.contracts.runs import Decision, IterationMetrics, IterationRecord, PairedTest, RunRecord, Stage
from services.contracts.scores import ScoreRow
from services.orchestrator import stages
from services.orchestrator.clock import now_iso
from services.orchestrator.gate import judge, paired_test
from services.orchestrator.measures import Evaluation, covered_seconds, deviation, mean, paired, win_rate
from services.orchestrator.metrics import ROLLBACKS, count_decision
from services.orchestrator.pairing import PairingResult, read_pairing
from services.orchestrator.stages import StageJob
from services.orchestrator.upstream import Upstream
from services.orchestrator.views import seconds_by_stage
from services.platform.jobs import EventStream, JobContext, JobQueue
from services.platform.logs import get_logger
from services.platform.store import ArtifactStore
from services.platform.tables import read_metadata, read_rows

log = get_logger(__name__)


class Deciding:
    """Handlers of `load`, `decide` and `rollback` jobs."""

    def __init__(self, store: ArtifactStore, upstream: Upstream, queue: JobQueue, events: EventStream) -> None:
        self.store = store
        self.upstream = upstream
        self.queue = queue
        self.events = events

    async def load(self, context: JobContext) -> dict[str, Any]:
        """Hot-swap the candidate in, on trial: outside requests wait or are answered by it, as the recipe says."""
        job = StageJob.model_validate(context.job.payload)
        assert job.policy is not None, "the planner names the candidate"
        if await asyncio.to_thread(self.store.exists, layout.iteration_file(job.run, job.iteration)):
            return {"version": layout.version_of(job.policy)}
        run = await asyncio.to_thread(self.store.read_model, layout.run_file(job.run), RunRecord)
        manifest = await asyncio.to_thread(self.store.manifest, job.policy)
        if manifest.version != layout.version_of(job.policy):
            raise StoreError(f"{job.policy} holds version {manifest.version!r}, not {layout.version_of(job.policy)!r}")
        info = await self.upstream.serve_policy(context, job.policy, run.recipe, trial=True)
        return {
            "version": layout.version_of(job.policy),
            "swap_seconds": info.last_swap_seconds,
            "proof_deviation": info.proof_deviation,
        }

    async def rollback(self, context: JobContext) -> dict[str, Any]:
        """Serve the policy a person rolled back to."""
        job = StageJob.model_validate(context.job.payload)
        assert job.policy is not None, "the planner names the policy"
        run = await asyncio.to_thread(self.store.read_model, layout.run_file(job.run), RunRecord)
        version = layout.version_of(job.policy)
        before = await self.upstream.policy(context)
        await self.upstream.serve_policy(context, job.policy, run.recipe, trial=False)
        if before.version != version:  # else an earlier attempt at this job, which could not tell, has done it
            ROLLBACKS.inc()
        return {"version": version}

    async def decide(self, context: JobContext) -> dict[str, Any]:
        """Judge the candidate, serve the winner, and publish the iteration's record."""
        job = StageJob.model_validate(context.job.payload)
        path = layout.iteration_file(job.run, job.iteration)
        if not await asyncio.to_thread(self.store.exists, path):
            run = await asyncio.to_thread(self.store.read_model, layout.run_file(job.run), RunRecord)
            jobs = await self.queue.get_many(list(stages.iteration_ids(run, job.iteration)))
            seconds = seconds_by_stage(run, job.iteration, jobs, now=time.time())
            record = await asyncio.to_thread(
                decide_iteration, self.store, run, job.iteration, job.incumbent or 0, seconds
            )
            winner = stages.policy_folder(run, job.iteration if record.decision != "rejected" else job.incumbent or 0)
            await self.upstream.serve_policy(context, winner, run.recipe, trial=False)
            if await asyncio.to_thread(self.store.publish_model, path, record):
                count_decision(record)
        record = await asyncio.to_thread(self.store.read_model, path, IterationRecord)
        summary = {
            "iteration": record.iteration,
            "decision": record.decision,
            "version": record.version,
            "serving": record.serving,
            "proxy_reward": record.metrics.proxy_reward,
            "reasons": list(record.reasons),
        }
        await self.events.publish(job.run, "iteration.decided", summary, job_id=context.job.id, kind=context.job.kind)
        await self.events.publish(layout.ALL_RUNS, "iteration.decided", {"run": job.run, **summary})
        log.info("iteration_decided", run=job.run, iteration=record.iteration, decision=record.decision)
        return summary


def decide_iteration(
    store: ArtifactStore, run: RunRecord, iteration: int, incumbent: int, seconds: dict[str, float]
) -> IterationRecord:
    """The gate's decision on an iteration and everything measured of it, from what is published.

    Args:
        incumbent: Iteration whose policy the candidate is compared with.
        seconds: Per stage, for the record.

    Raises:
        JobFailed: too few held-out prompts were answered by both.
    """
    candidate = read_evaluation(store, run, iteration)
    version = stages.policy_version(run, iteration)
    if iteration == 0:
        metrics = IterationMetrics(**_candidate_metrics(candidate), prompts=None)
        return IterationRecord(
            run_id=run.id, iteration=0, version=version, incumbent=version, serving=version, decision="baseline",
            reasons=("baseline: the initial policy, which is the fixed reference of all iterations",),
            metrics=metrics, seconds_by_stage=seconds, decided_at=now_iso(),
        )  # fmt: skip
    against = read_evaluation(store, run, incumbent)
    reference = against if incumbent == 0 else read_evaluation(store, run, 0)
    test = _test(candidate, against, run, iteration)
    verdict = judge(
        test, run.recipe.gate, kl=candidate.kl,
        candidate_tokens=candidate.mean_tokens or 0.0, incumbent_tokens=against.mean_tokens or 0.0,
    )  # fmt: skip
    decision: Decision = verdict.decision
    incumbent_version = stages.policy_version(run, incumbent)
    metrics = IterationMetrics(
        **_candidate_metrics(candidate),
        incumbent_reward=against.mean_reward,
        win_rate_vs_reference=win_rate(candidate.rewards, reference.rewards),
        win_rate_vs_incumbent=win_rate(candidate.rewards, against.rewards),
        **_sampled_metrics(
            read_pairing(store, layout.pairs_file(run.id, iteration)), _sampling_seconds(store, run, iteration)
        ),
        **_training_metrics(store, run, iteration),
    )
    return IterationRecord(
        run_id=run.id, iteration=iteration, version=version, incumbent=incumbent_version,
        serving=version if decision == "promoted" else incumbent_version, decision=decision, reasons=verdict.reasons,
        test=test, metrics=metrics, seconds_by_stage=seconds, decided_at=now_iso(),
    )  # fmt: skip


def read_evaluation(store: ArtifactStore, run: RunRecord, iteration: int) -> Evaluation:
    """Held-out responses and rewards of an iteration's policy."""
    evaluation = Evaluation()
    expected = stages.policy_version(run, iteration)
    for chunk in stages.chunks_of(run, Stage.EVALUATE):
        rollouts = read_rows(store, layout.rollouts_file(run.id, iteration, chunk, evaluation=True), Rollout)
        rows = read_rows(store, layout.scores_file(run.id, iteration, chunk, evaluation=True), ScoreRow)
        scores = {row.prompt_id: row for row in rows}
        for rollout in rollouts:
            if rollout.policy_version != expected:
                raise StoreError(
                    f"held-out prompt {rollout.prompt_id!r} of iteration {iteration} was answered by "
                    f"{rollout.policy_version}, not by {expected}"
                )
            if rollout.prompt_id not in scores:
                raise StoreError(f"held-out prompt {rollout.prompt_id!r} of iteration {iteration} has no scores")
            evaluation.add(rollout, scores[rollout.prompt_id])
    return evaluation


def _test(candidate: Evaluation, incumbent: Evaluation, run: RunRecord, iteration: int) -> PairedTest:
    ours, theirs = paired(candidate.rewards, incumbent.rewards)
    if len(ours) < 2:
        raise JobFailed(
            f"iteration {iteration}: only {len(ours)} of {run.heldout_total} held-out prompts were answered by "
            "candidate and incumbent; the gate needs at least 2"
        )
    return paired_test(ours, theirs)


def _candidate_metrics(candidate: Evaluation) -> dict[str, Any]:
    rewards = list(candidate.rewards.values())
    return {
        "proxy_reward": mean(rewards),
        "proxy_reward_std": deviation(rewards),
        "kl": candidate.kl,
        "response_tokens": candidate.mean_tokens,
        "truncated_fraction": candidate.truncated_fraction,
    }


def _sampling_seconds(store: ArtifactStore, run: RunRecord, iteration: int) -> float:
    """Time in which at least one chunk was being generated: chunks overlap, and a pause between them does not count."""
    spans: list[tuple[float, float]] = []
    for chunk in stages.chunks_of(run, Stage.SAMPLE):
        metadata = read_metadata(store.read_bytes(layout.rollouts_file(run.id, iteration, chunk)))
        spans.append((float(metadata["started_at"]), float(metadata["finished_at"])))
    return covered_seconds(spans)


def _sampled_metrics(pairing: PairingResult, seconds: float) -> dict[str, Any]:
    sampled = pairing.sampling
    return {
        "sampled_reward_mean": sampled.reward_mean,
        "sampled_reward_best": sampled.reward_best,
        "sampled_reward_spread": sampled.reward_spread,
        "reward_length_correlation": sampled.reward_length_correlation,
        "duplicate_fraction": sampled.duplicate_fraction,
        "sampled_truncated_fraction": sampled.truncated_fraction,
        "sampled_response_tokens": sampled.response_tokens,
        "sampled_tokens_per_second": round(sampled.tokens / seconds, 1) if seconds > 0 else None,
        "prompts": pairing.prompts,
        "responses": sampled.responses,
        "pairs": pairing.pairs,
        "dropped": pairing.dropped,
    }


def _training_metrics(store: ArtifactStore, run: RunRecord, iteration: int) -> dict[str, Any]:
    try:
        metrics = store.manifest(layout.checkpoint_folder(run.id, iteration)).metrics
    except NotFound:
        return {}
    return {f"dpo_{name}": metrics.get(name) for name in ("loss", "accuracy", "margin")}
