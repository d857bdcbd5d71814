"""Job handlers that draw an iteration's prompts and make its preference pairs."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

from services.contracts import layout
from services.contracts.conversations import Prompt
from services.contracts.errors import JobFailed, StoreError
from services.contracts.model import Contract
from services.contracts.pairs import DropReason, Pair, PairRules
from services.contracts.rollouts import Rollout, RolloutFailure
from services.contracts.runs import RunRecord, Stage
from services.contracts.scores import ScoreRow
from services.contracts.tracing import prompt_trace_id
from services.orchestrator import metrics, stages
from services.orchestrator.draws import derive_seed, draw_prompts
from services.orchestrator.measures import SamplingMeasures, SamplingTally
from services.orchestrator.pair_rules import pair_of
from services.orchestrator.stages import StageJob
from services.platform.jobs import JobContext
from services.platform.logs import get_logger
from services.platform.store import ArtifactStore
from services.platform.tables import publish_rows, read_metadata, read_rows

log = get_logger(__name__)


class PairingResult(Contract):
    """Result of a pair job, kept in the metadata of its file too."""

    pairs: int
    prompts: int
    dropped: dict[str, int]
    sampling: SamplingMeasures


class Pairing:
    """Handlers of `prompts` and `pair` jobs. Their output depends on the store alone."""

    def __init__(self, store: ArtifactStore) -> None:
        self.store = store

    async def prompts(self, context: JobContext) -> dict[str, Any]:
        """Draw the prompts of an iteration."""
        return await asyncio.to_thread(self._prompts, StageJob.model_validate(context.job.payload))

    async def pair(self, context: JobContext) -> dict[str, Any]:
        """Make the pairs of an iteration from all its scored rollouts."""
        return await asyncio.to_thread(self._pair, context, StageJob.model_validate(context.job.payload))

    def _prompts(self, job: StageJob) -> dict[str, Any]:
        path = layout.prompts_file(job.run, job.iteration)
        if not self.store.exists(path):
            run = self.store.read_model(layout.run_file(job.run), RunRecord)
            pool = {prompt.id: prompt for prompt in read_rows(self.store, layout.pool_file(job.run), Prompt)}
            count, seed = run.recipe.sampling.prompts_per_iteration, run.recipe.seed
            drawn = draw_prompts(list(pool), count, job.iteration, seed)
            prompts = [
                pool[id].model_copy(update={"trace_id": prompt_trace_id(job.run, job.iteration, id)}) for id in drawn
            ]
            publish_rows(self.store, path, prompts, Prompt)
            for prompt in prompts:
                log.info("prompt_drawn", prompt_id=prompt.id, trace_id=prompt.trace_id)
        return {"path": path}

    def _pair(self, context: JobContext, job: StageJob) -> dict[str, Any]:
        path = layout.pairs_file(job.run, job.iteration)
        if not self.store.exists(path):
            run = self.store.read_model(layout.run_file(job.run), RunRecord)
            pairs, result = build_pairs(self.store, run, job.iteration, context)
            if not pairs:
                raise JobFailed(no_pairs(result, run.recipe.pairs))
            if publish_rows(self.store, path, pairs, Pair, {"result": result.model_dump_json()}):
                metrics.count_pairs(result.pairs, result.dropped)
        return read_pairing(self.store, path).model_dump(mode="json")


def read_pairing(store: ArtifactStore, path: str) -> PairingResult:
    """What the pair job counted and measured, from its published file."""
    return PairingResult.model_validate_json(read_metadata(store.read_bytes(path))["result"])


def build_pairs(
    store: ArtifactStore, run: RunRecord, iteration: int, context: JobContext | None = None
) -> tuple[list[Pair], PairingResult]:
    """Pairs of an iteration in the order of its prompts, and what became of every other prompt.

    Chunk by chunk, so that only the pairs are held in memory.

    Raises:
        StoreError: a prompt is missing or twice, or two policy versions meet.
    """
    recipe = run.recipe
    seed = derive_seed(recipe.seed, "pairs", iteration)
    expected = [prompt.id for prompt in read_rows(store, layout.prompts_file(run.id, iteration), Prompt)]
    tally, dropped, pairs = SamplingTally(), Counter[DropReason](), list[Pair]()
    seen: Counter[str] = Counter()
    versions: set[str] = set()
    for chunk in stages.chunks_of(run, Stage.SAMPLE):
        source = layout.rollouts_file(run.id, iteration, chunk)
        metadata = read_metadata(store.read_bytes(source))
        failures = [RolloutFailure.model_validate(item) for item in json.loads(metadata["failures"])]
        seen.update(failure.prompt_id for failure in failures)
        for failure in failures:
            _log_dropped(run.id, iteration, failure.prompt_id, DropReason.GENERATION_FAILED)
        dropped[DropReason.GENERATION_FAILED] += len(failures)
        rollouts = read_rows(store, source, Rollout)
        scores = {
            row.prompt_id: row for row in read_rows(store, layout.scores_file(run.id, iteration, chunk), ScoreRow)
        }
        for rollout in rollouts:
            if rollout.prompt_id not in scores:
                raise StoreError(f"{source}: prompt {rollout.prompt_id!r} has no scores")
            outcome = pair_of(rollout, scores[rollout.prompt_id], recipe.pairs, seed)
            seen[rollout.prompt_id] += 1
            versions.add(rollout.policy_version)
            tally.add(rollout, scores[rollout.prompt_id])
            dropped += outcome.dropped
            if outcome.pair is not None:
                trace_id = prompt_trace_id(run.id, iteration, rollout.prompt_id)
                pairs.append(outcome.pair.model_copy(update={"trace_id": trace_id}))
                log.info("pair_made", prompt_id=rollout.prompt_id, trace_id=trace_id, margin=outcome.pair.margin)
            if outcome.reason is not None:
                dropped[outcome.reason] += 1
                _log_dropped(run.id, iteration, rollout.prompt_id, outcome.reason)
        if context is not None:
            context.progress(items_done=sum(seen.values()), items_total=len(expected))
    if seen != Counter(expected):
        lost = [id for id in expected if seen[id] != 1][:3] or [id for id in seen if id not in set(expected)][:3]
        raise StoreError(
            f"{run.id}, iteration {iteration}: prompts lost, doubled or unknown among the rollouts: {lost}"
        )
    if len(versions) > 1:
        raise StoreError(f"{run.id}, iteration {iteration}: rollouts of two policy versions meet: {sorted(versions)}")
    result = PairingResult(
        pairs=len(pairs), prompts=len(expected), sampling=tally.measures(),
        dropped={reason.value: count for reason, count in sorted(dropped.items()) if count},
    )  # fmt: skip
    return pairs, result


def _log_dropped(run: str, iteration: int, prompt_id: str, reason: DropReason) -> None:
    trace_id = prompt_trace_id(run, iteration, prompt_id)
    log.info("prompt_dropped", prompt_id=prompt_id, trace_id=trace_id, reason=reason.value)


def no_pairs(result: PairingResult, rules: PairRules) -> str:
    """Why an iteration made no pair at all, and what can be done."""
    counts = ", ".join(f"{reason} {count}" for reason, count in result.dropped.items()) or "none dropped"
    remedies = {
        DropReason.RESPONSE_TRUNCATED: "raise sampling.max_tokens or set pairs.drop_truncated = false",
        DropReason.IDENTICAL_TOKENS: "raise the temperatures of sampling.groups",
        DropReason.BELOW_MARGIN: f"lower pairs.min_margin ({rules.min_margin:g})",
        DropReason.TIE: "check that the reward model tells responses apart",
        DropReason.GENERATION_FAILED: "look at the failures in the metadata of the rollout files",
    }
    main = max(remedies, key=lambda reason: result.dropped.get(reason.value, 0))
    return f"no preference pair from {result.prompts} prompts ({counts}); {remedies[main]}, in a new run"
