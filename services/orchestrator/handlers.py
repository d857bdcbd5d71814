"""The orchestrator's job handlers, by kind."""

from __future__ import annotations

import asyncio
from typing import Any

from services.contracts.errors import Cancelled
from services.contracts.runs import Stage
from services.orchestrator import stages
from services.orchestrator.deciding import Deciding
from services.orchestrator.pairing import Pairing
from services.orchestrator.sampling import Sampler
from services.orchestrator.scoring import Scoring
from services.orchestrator.upstream import Upstream
from services.platform.jobs import EventStream, Handler, JobContext, JobQueue
from services.platform.store import ArtifactStore


def handlers(store: ArtifactStore, upstream: Upstream, queue: JobQueue, events: EventStream) -> dict[str, Handler]:
    """Job kind -> handler. All are idempotent: they first look whether their output is published."""
    sampler, scoring = Sampler(store, upstream), Scoring(store, upstream)
    pairing, deciding = Pairing(store), Deciding(store, upstream, queue, events)
    by_kind: dict[str, Handler] = {
        Stage.PROMPTS: pairing.prompts,
        Stage.SAMPLE: sampler.sample,
        Stage.SCORE: scoring.score,
        Stage.PAIR: pairing.pair,
        Stage.LOAD: deciding.load,
        Stage.EVALUATE: sampler.evaluate,
        Stage.EVALUATE_SCORE: scoring.score_evaluation,
        Stage.DECIDE: deciding.decide,
        stages.ROLLBACK_KIND: deciding.rollback,
    }
    return {str(kind): stopping_at_once(handler) for kind, handler in by_kind.items()}


def stopping_at_once(handler: Handler) -> Handler:
    """A handler that ends as soon as its job is cancelled or lost, wherever it waits. Nothing half-done stays behind:
    what is published is whole, and a broken-off stream tells the generator to stop."""

    async def run(context: JobContext) -> dict[str, Any]:
        work = asyncio.ensure_future(handler(context))
        ends = [asyncio.ensure_future(event.wait()) for event in (context.cancelled, context.lost)]
        try:
            await asyncio.wait({work, *ends}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            raise Cancelled(f"job {context.job.id} was cancelled or taken over while it ran")
        finally:
            for task in (work, *ends):
                task.cancel()
            await asyncio.gather(work, *ends, return_exceptions=True)

    return run
