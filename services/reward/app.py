"""HTTP surface of the reward service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any, TypeVar

import torch
from fastapi import Depends, FastAPI, Path, Request, Response

from services.contracts.errors import RatchetError
from services.contracts.model import Name
from services.contracts.scores import (
    LogprobRequest,
    LogprobResponse,
    ScoreItem,
    ScoreRequest,
    ScoreResponse,
    ScorerInfo,
    ScorerSpec,
)
from services.platform.auth import bearer_scheme, require_token
from services.platform.logs import get_logger
from services.platform.service import create_service
from services.platform.store import ArtifactStore
from services.reward.batching import BatchLimits, BatchQueue
from services.reward.bradley_terry import BradleyTerryScorer
from services.reward.loading import make_loader
from services.reward.logprobs import LogprobScorer
from services.reward.scorers import ScorerRegistry, group_values
from services.reward.settings import RewardSettings

log = get_logger(__name__)

VERSION = "1"
CLIENT_CLOSED_REQUEST = 499
"""Nobody reads it: the caller has gone."""

Answer = TypeVar("Answer")
ScorerName = Annotated[Name, Path(description="Name of the scorer, e.g. `default` or `reference`.")]


def create_app(settings: RewardSettings) -> FastAPI:
    """The reward service's app; scorers of `settings.reward_scorers` are loaded after the start, in the background."""
    torch.set_num_threads(settings.reward_threads)
    registry = ScorerRegistry(make_loader(ArtifactStore(settings.store_url), settings))
    limits = BatchLimits(
        batch_tokens=settings.reward_max_batch_tokens,
        batch_sequences=settings.reward_max_batch_sequences,
        queued_tokens=settings.reward_max_queued_tokens,
        stuck_seconds=settings.reward_stuck_seconds,
    )
    queue = BatchQueue(limits, prepare_thread=lambda: torch.set_num_threads(settings.reward_threads))

    async def load_configured() -> None:
        for name, spec in settings.reward_scorers.items():
            with suppress(RatchetError):  # logged and told by readiness; the others still load
                await registry.put(name, spec)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(load_configured())
        yield
        loading.cancel()
        await asyncio.to_thread(queue.close)

    async def live() -> str | None:
        return queue.trouble()

    async def ready() -> str | None:
        return queue.trouble() or registry.trouble()

    app = create_service(
        "reward", title="Ratchet reward service", version=VERSION, lifespan=lifespan, live=live, ready=ready,
        token=settings.token,
    )  # fmt: skip
    app.state.queue = queue
    app.state.registry = registry
    control = [Depends(require_token(settings.token)), Depends(bearer_scheme)]

    @app.post("/v1/score", response_model=ScoreResponse, tags=["scores"], summary="Raw rewards of prompts' responses")
    async def score(body: ScoreRequest, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        scorer = registry.get(body.scorer, body.revision, BradleyTerryScorer)
        queue.refuse_when_full()

        async def compute() -> ScoreResponse:
            sequences = await asyncio.to_thread(scorer.prepare, body.items)
            values = await queue.submit(scorer, sequences)
            counts = [len(item.responses) for item in body.items]
            answer = ScoreResponse(
                scorer=body.scorer,
                revision=scorer.info.revision,
                template_hash=scorer.info.template_hash,
                scores=group_values(values, sequences, counts, "score", scorer.info),
            )
            log_scores(body.items, answer)
            return answer

        return _json(await while_connected(request, compute()))

    @app.post("/v1/logprobs", response_model=LogprobResponse, tags=["scores"], summary="Log-probs of exact responses")
    async def logprobs(body: LogprobRequest, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        scorer = registry.get(body.scorer, body.revision, LogprobScorer)
        queue.refuse_when_full()

        async def compute() -> LogprobResponse:
            sequences = await asyncio.to_thread(scorer.prepare, body.items)
            values = await queue.submit(scorer, sequences)
            counts = [len(item.response_token_ids) for item in body.items]
            return LogprobResponse(
                scorer=body.scorer,
                revision=scorer.info.revision,
                logprobs=group_values(values, sequences, counts, "log-prob", scorer.info),
            )

        return _json(await while_connected(request, compute()))

    @app.put("/v1/scorers/{name}", tags=["scorers"], summary="Load, prove and serve a scorer", dependencies=control)
    async def put_scorer(name: ScorerName, spec: ScorerSpec) -> ScorerInfo:  # pyright: ignore[reportUnusedFunction]
        return await registry.put(name, spec)

    @app.get("/v1/scorers", tags=["scorers"], summary="Scorers that serve")
    async def list_scorers() -> list[ScorerInfo]:  # pyright: ignore[reportUnusedFunction]
        return registry.infos()

    @app.get("/v1/scorers/{name}", tags=["scorers"], summary="One scorer")
    async def get_scorer(name: ScorerName) -> ScorerInfo:  # pyright: ignore[reportUnusedFunction]
        return registry.info(name)

    @app.delete(
        "/v1/scorers/{name}", tags=["scorers"], status_code=204, summary="Forget a scorer", dependencies=control
    )
    async def delete_scorer(name: ScorerName) -> None:  # pyright: ignore[reportUnusedFunction]
        await registry.delete(name)

    return app


def log_scores(items: Sequence[ScoreItem], answer: ScoreResponse) -> None:
    """One line per prompt. An item without a trace id is logged with the request's, which is in the log's context."""
    for place, (item, scores) in enumerate(zip(items, answer.scores, strict=True)):
        ids = {"trace_id": item.trace_id} if item.trace_id else {}
        log.info(
            "prompt_scored", **ids, item=place, scorer=answer.scorer, revision=answer.revision, responses=len(scores),
            best=max(scores), worst=min(scores),
        )  # fmt: skip


async def while_connected(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer | None:
    """The work's result; None when the caller hung up first, in which case the work was cancelled."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        gone.cancel()
        task.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(answer: ScoreResponse | LogprobResponse | None) -> Response:
    if answer is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    # Written by pydantic itself: FastAPI's own way goes over Python objects, and scores are many
    return Response(answer.model_dump_json(), media_type="application/json")
