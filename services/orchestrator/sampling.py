"""Job handlers that have responses generated: chunks of an iteration's prompts, and of the held-out prompts."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from services.contracts import layout
from services.contracts.conversations import Prompt
from services.contracts.errors import PolicyMismatch, RatchetError, Unavailable, UpstreamFailed
from services.contracts.problems import Problem
from services.contracts.rollouts import Rollout, RolloutFailure, RolloutLine, RolloutRequest, Sampling, SamplingGroup
from services.contracts.runs import RunRecord
from services.contracts.tracing import prompt_trace_id
from services.orchestrator.draws import derive_seed
from services.orchestrator.stages import StageJob
from services.orchestrator.upstream import Upstream
from services.platform.jobs import JobContext
from services.platform.logs import get_logger
from services.platform.store import ArtifactStore
from services.platform.tables import publish_rows, read_metadata, read_rows

log = get_logger(__name__)

PASSING_STATUSES = frozenset({408, 429, 502, 503, 504})
"""Failures of one prompt that another try may mend; the statuses that a client retries."""
MISMATCH = PolicyMismatch.code


@dataclass
class _Chunk:
    """What has come back so far."""

    rollouts: dict[str, Rollout] = field(default_factory=dict[str, Rollout])
    failures: dict[str, Problem] = field(default_factory=dict[str, Problem])
    tokens: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return max(1e-6, time.monotonic() - self.started)


class Sampler:
    """Handlers of `sample` and `evaluate` jobs."""

    def __init__(self, store: ArtifactStore, upstream: Upstream) -> None:
        self.store = store
        self.upstream = upstream

    async def sample(self, context: JobContext) -> dict[str, Any]:
        """n responses for each prompt of a chunk, from the incumbent."""
        job = StageJob.model_validate(context.job.payload)
        run = await asyncio.to_thread(self.store.read_model, layout.run_file(job.run), RunRecord)
        recipe = run.recipe
        return await self._generate(
            context, job, run,
            source=layout.prompts_file(job.run, job.iteration), chunk_size=recipe.sampling.chunk_size,
            sampling=recipe.sampling.sampling(), seed=derive_seed(recipe.seed, "sample", job.iteration),
            evaluation=False,
        )  # fmt: skip

    async def evaluate(self, context: JobContext) -> dict[str, Any]:
        """Responses to a chunk of held-out prompts; the same prompts and seeds in every iteration."""
        job = StageJob.model_validate(context.job.payload)
        run = await asyncio.to_thread(self.store.read_model, layout.run_file(job.run), RunRecord)
        recipe = run.recipe
        evaluation = recipe.evaluation
        group = SamplingGroup(n=evaluation.n, temperature=evaluation.temperature, top_p=evaluation.top_p)
        return await self._generate(
            context, job, run,
            source=layout.heldout_file(job.run), chunk_size=evaluation.chunk_size,
            sampling=Sampling(groups=(group,), max_tokens=evaluation.max_tokens or recipe.sampling.max_tokens),
            seed=derive_seed(recipe.seed, "evaluate"), evaluation=True,
        )  # fmt: skip

    async def _generate(
        self, context: JobContext, job: StageJob, run: RunRecord, *,
        source: str, chunk_size: int, sampling: Sampling, seed: int, evaluation: bool,
    ) -> dict[str, Any]:  # fmt: skip
        output = layout.rollouts_file(job.run, job.iteration, job.chunk, evaluation=evaluation)
        if await asyncio.to_thread(self.store.exists, output):
            return await asyncio.to_thread(published_chunk, self.store, output)
        assert job.policy is not None, "the planner names the policy of every generating job"
        prompts = await asyncio.to_thread(read_rows, self.store, source, Prompt)
        prompts = [
            prompt.model_copy(update={"trace_id": prompt_trace_id(job.run, job.iteration, prompt.id)})
            for prompt in prompts[job.chunk * chunk_size : (job.chunk + 1) * chunk_size]
        ]
        version = layout.version_of(job.policy)
        trial = evaluation and job.iteration > 0
        context.progress(items_done=0, items_total=len(prompts), tokens=0, policy_version=version)
        chunk = _Chunk()
        await self._ask_until_answered(context, chunk, prompts, job.policy, run, sampling, seed, trial)
        rows = [
            chunk.rollouts[prompt.id].model_copy(update={"trace_id": prompt.trace_id})
            for prompt in prompts
            if prompt.id in chunk.rollouts
        ]
        failures = [
            RolloutFailure(prompt_id=prompt.id, problem=chunk.failures[prompt.id]).model_dump(
                mode="json", exclude_none=True
            )
            for prompt in prompts
            if prompt.id in chunk.failures
        ]
        metadata = {
            "policy_version": version,
            "seed": str(seed),
            "tokens": str(chunk.tokens),
            "started_at": f"{time.time() - chunk.seconds:.3f}",
            "finished_at": f"{time.time():.3f}",
            "failures": json.dumps(failures, ensure_ascii=False),
        }
        await asyncio.to_thread(publish_rows, self.store, output, rows, Rollout, metadata)
        return await asyncio.to_thread(published_chunk, self.store, output)

    async def _ask_until_answered(
        self, context: JobContext, chunk: _Chunk, prompts: Sequence[Prompt], folder: str, run: RunRecord,
        sampling: Sampling, seed: int, trial: bool,
    ) -> None:  # fmt: skip
        """Ask for what is missing until every prompt is answered or has failed for good."""
        version = layout.version_of(folder)
        settings = self.upstream.settings
        last: RatchetError | None = None
        barren = 0
        while missing := [p for p in prompts if p.id not in chunk.rollouts and p.id not in chunk.failures]:
            if barren == settings.prompt_rounds:
                why = last.detail if last else "the stream ended early"
                raise Unavailable(
                    f"{len(missing)} of {len(prompts)} prompts (first: {missing[0].id}) were not answered, and the "
                    f"last {barren} tries brought none; the last problem: {why}"
                )
            if last is not None:
                await asyncio.sleep(settings.wait_pause_seconds)
            await self.upstream.serve_policy(context, folder, run.recipe, trial=trial)
            request = RolloutRequest(policy_version=version, prompts=tuple(missing), sampling=sampling, seed=seed)
            try:
                last = await self._stream(context, chunk, request, len(prompts))
            except RatchetError as error:
                # What came before the stream broke is kept; the rest is asked again.
                if not error.retryable and error.code != MISMATCH:
                    raise
                last = error
            left = sum(1 for p in missing if p.id not in chunk.rollouts and p.id not in chunk.failures)
            barren = barren + 1 if left == len(missing) else 0

    async def _stream(
        self, context: JobContext, chunk: _Chunk, request: RolloutRequest, total: int
    ) -> RatchetError | None:
        """Read one stream into the chunk; returns the last passing failure of a prompt, if any."""
        asked = {prompt.id: prompt.trace_id for prompt in request.prompts}
        passing: RatchetError | None = None
        silence = self.upstream.settings.rollout_silence_seconds
        async with self.upstream.generator.stream(
            "POST", "/v1/rollouts", body=request, read_seconds=silence
        ) as response:
            async for text in response.aiter_lines():
                if not text.strip():
                    continue
                line = RolloutLine.model_validate_json(text)
                if line.rollout is not None:
                    check_rollout(line.rollout, request)
                    asked.pop(line.rollout.prompt_id, None)
                    chunk.rollouts[line.rollout.prompt_id] = line.rollout
                    chunk.tokens += sum(len(answer.token_ids) for answer in line.rollout.responses)
                elif line.failure is not None:
                    problem = line.failure.problem
                    if line.failure.prompt_id not in asked:
                        raise UpstreamFailed(
                            f"the generator reports a failure of {line.failure.prompt_id!r}, not asked"
                        )
                    if problem.status in PASSING_STATUSES or problem.code == MISMATCH:
                        passing = Unavailable(f"prompt {line.failure.prompt_id}: {problem.detail}")
                    else:
                        log.warning(
                            "prompt_failed", prompt_id=line.failure.prompt_id,
                            trace_id=asked[line.failure.prompt_id], problem=problem.detail,
                        )  # fmt: skip
                        chunk.failures[line.failure.prompt_id] = problem
                context.progress(
                    items_done=len(chunk.rollouts) + len(chunk.failures), items_total=total, tokens=chunk.tokens,
                    tokens_per_second=round(chunk.tokens / chunk.seconds, 1), policy_version=request.policy_version,
                )  # fmt: skip
        return passing


def check_rollout(rollout: Rollout, request: RolloutRequest) -> None:
    """Refuse a rollout that is not what was asked for: another prompt, policy version or number of responses."""
    if rollout.prompt_id not in {prompt.id for prompt in request.prompts}:
        raise UpstreamFailed(f"the generator answered prompt {rollout.prompt_id!r}, which was not asked")
    if rollout.policy_version != request.policy_version:
        raise PolicyMismatch(
            f"prompt {rollout.prompt_id!r} was answered by {rollout.policy_version}, not by {request.policy_version}; "
            "the answer is not used"
        )
    if len(rollout.responses) != request.sampling.n:
        raise UpstreamFailed(
            f"prompt {rollout.prompt_id!r} has {len(rollout.responses)} responses, {request.sampling.n} were asked for"
        )


def published_chunk(store: ArtifactStore, path: str) -> dict[str, Any]:
    """Result of a generating job, from its published file: the same whether it just ran or ran before a restart."""
    data = store.read_bytes(path)
    metadata = read_metadata(data)
    rows = read_rows(store, path, Rollout)
    tokens, seconds = int(metadata["tokens"]), float(metadata["finished_at"]) - float(metadata["started_at"])
    return {
        "path": path,
        "policy_version": metadata["policy_version"],
        "prompts": len(rows),
        "failures": len(json.loads(metadata["failures"])),
        "responses": sum(len(row.responses) for row in rows),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1) if seconds > 0 else None,
    }
