"""Job handlers that have responses scored, chunk by chunk, beside their rollouts."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from services.contracts import layout
from services.contracts.errors import Conflict, NotFound, ScoreInvalid
from services.contracts.rollouts import Rollout
from services.contracts.runs import RunRecord
from services.contracts.scores import (
    LogprobItem,
    LogprobRequest,
    LogprobResponse,
    ScoreItem,
    ScoreRequest,
    ScoreResponse,
    ScoreRow,
    ScorerSpec,
)
from services.orchestrator.stages import StageJob
from services.orchestrator.upstream import Upstream
from services.platform.jobs import JobContext
from services.platform.store import ArtifactStore
from services.platform.tables import publish_rows, read_rows

REWARD, REFERENCE = "default", "reference"
"""Names under which a run's scorers are loaded."""


class Scoring:
    """Handlers of `score` and `evaluate-score` jobs."""

    def __init__(self, store: ArtifactStore, upstream: Upstream) -> None:
        self.store = store
        self.upstream = upstream

    async def score(self, context: JobContext) -> dict[str, Any]:
        """Rewards of a chunk of sampled responses."""
        return await self._score(context, evaluation=False)

    async def score_evaluation(self, context: JobContext) -> dict[str, Any]:
        """Rewards of a chunk of held-out responses, with their log-probs under the reference when KL is measured."""
        return await self._score(context, evaluation=True)

    async def _score(self, context: JobContext, *, evaluation: bool) -> dict[str, Any]:
        job = StageJob.model_validate(context.job.payload)
        place = (job.run, job.iteration, job.chunk)
        output = layout.scores_file(*place, evaluation=evaluation)
        if not await asyncio.to_thread(self.store.exists, output):
            run = await asyncio.to_thread(self.store.read_model, layout.run_file(job.run), RunRecord)
            source = layout.rollouts_file(*place, evaluation=evaluation)
            rollouts = await asyncio.to_thread(read_rows, self.store, source, Rollout)
            rows = await self._rows(context, run, rollouts, kl=evaluation and run.recipe.evaluation.measure_kl)
            await asyncio.to_thread(publish_rows, self.store, output, rows, ScoreRow)
        rows = await asyncio.to_thread(read_rows, self.store, output, ScoreRow)
        return {"path": output, "prompts": len(rows), "responses": sum(len(row.rewards) for row in rows)}

    async def _rows(
        self, context: JobContext, run: RunRecord, rollouts: Sequence[Rollout], *, kl: bool
    ) -> list[ScoreRow]:
        size = self.upstream.settings.score_batch_prompts
        rows: list[ScoreRow] = []
        context.progress(items_done=0, items_total=len(rollouts))
        if rollouts:
            await self._load(context, run, kl=kl)
        for start in range(0, len(rollouts), size):
            batch = rollouts[start : start + size]
            try:
                rows += await self._batch(context, run, batch, kl=kl)
            except (NotFound, Conflict):
                # The reward service was restarted, or another run's scorer has the name: load ours and ask again.
                await self._load(context, run, kl=kl)
                rows += await self._batch(context, run, batch, kl=kl)
            context.progress(items_done=len(rows), items_total=len(rollouts))
        return rows

    async def _load(self, context: JobContext, run: RunRecord, *, kl: bool) -> None:
        recipe = run.recipe
        spec = ScorerSpec(
            kind="bradley_terry", checkpoint=run.models.reward_model, max_tokens=recipe.reward_max_tokens,
            truncate=recipe.reward_truncate,
        )  # fmt: skip
        await self.upstream.load_scorer(context, REWARD, spec)
        if kl:
            await self.upstream.load_scorer(
                context, REFERENCE, ScorerSpec(kind="logprob", checkpoint=run.models.policy)
            )

    async def _batch(
        self, context: JobContext, run: RunRecord, batch: Sequence[Rollout], *, kl: bool
    ) -> list[ScoreRow]:
        seconds = self.upstream.settings.score_seconds
        request = ScoreRequest(
            scorer=REWARD, revision=layout.version_of(run.models.reward_model),
            items=tuple(
                ScoreItem(
                    messages=row.messages,
                    responses=tuple(response.text for response in row.responses),
                    allow_empty=True,  # what the policy sampled is judged as it is; pairing drops and counts it
                    trace_id=row.trace_id,
                )
                for row in batch
            ),
        )  # fmt: skip
        reward = self.upstream.reward
        scored = await self.upstream.patiently(
            context,
            lambda: reward.call("POST", "/v1/score", body=request, answer=ScoreResponse, timeout_seconds=seconds),
        )
        check_matrix(scored.scores, batch, "score")
        logprobs: Sequence[tuple[float, ...] | None] = [None] * len(batch)
        if kl:
            logprobs = await self._reference_logprobs(context, run, batch)
        return [
            ScoreRow(
                prompt_id=row.prompt_id, rewards=rewards, reference_logprobs=reference, scorer=scored.scorer,
                revision=scored.revision, template_hash=scored.template_hash,
            )
            for row, rewards, reference in zip(batch, scored.scores, logprobs, strict=True)
        ]  # fmt: skip

    async def _reference_logprobs(
        self, context: JobContext, run: RunRecord, batch: Sequence[Rollout]
    ) -> tuple[tuple[float, ...], ...]:
        request = LogprobRequest(
            scorer=REFERENCE, revision=layout.version_of(run.models.policy),
            items=tuple(
                LogprobItem(
                    prompt_token_ids=row.prompt_token_ids,
                    response_token_ids=tuple(response.token_ids for response in row.responses),
                )
                for row in batch
            ),
        )  # fmt: skip
        seconds = self.upstream.settings.score_seconds
        reward = self.upstream.reward
        answer = await self.upstream.patiently(
            context,
            lambda: reward.call("POST", "/v1/logprobs", body=request, answer=LogprobResponse, timeout_seconds=seconds),
        )
        check_matrix(answer.logprobs, batch, "log-prob")
        return answer.logprobs


def check_matrix(values: Sequence[Sequence[float]], batch: Sequence[Rollout], what: str) -> None:
    """Every response has one finite value. Raises ScoreInvalid; a missing score is never replaced."""
    if len(values) != len(batch):
        raise ScoreInvalid(f"the reward service gave {what}s for {len(values)} prompts, {len(batch)} were asked")
    for row, of_row in zip(batch, values, strict=True):
        if len(of_row) != len(row.responses):
            raise ScoreInvalid(f"prompt {row.prompt_id!r}: {len(of_row)} {what}s for {len(row.responses)} responses")
        for index, value in enumerate(of_row):
            if not math.isfinite(value):
                raise ScoreInvalid(f"prompt {row.prompt_id!r}, response {index}: the {what} is {value}")
