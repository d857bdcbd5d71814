"""The orchestrator's routes. What they do is in `runs`, `datasets`, `rows` and `events`."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from fastapi.responses import StreamingResponse

from services.contracts.errors import TooLarge
from services.contracts.model import Name
from services.contracts.runs import (
    DatasetInfo,
    IterationsRequest,
    IterationView,
    PairPage,
    RollbackRequest,
    RolloutPage,
    RunCreated,
    RunRequest,
    RunView,
)
from services.orchestrator.datasets import receive_dataset
from services.orchestrator.events import event_lines
from services.orchestrator.rows import pair_page, rollout_page
from services.orchestrator.runs import RunService
from services.orchestrator.settings import OrchestratorSettings
from services.platform.auth import bearer_scheme, require_token
from services.platform.store import ArtifactStore

MAX_PAGE = 1000
RunId = Annotated[Name, Path(description="Id of the run.")]
Iteration = Annotated[int, Path(ge=0, description="0 is the baseline.")]
Offset = Annotated[int, Query(ge=0)]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]
OCTETS = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


def routes(settings: OrchestratorSettings, store: ArtifactStore) -> APIRouter:
    """All routes. The run service is on `app.state.runs` from start-up on."""
    router = APIRouter(prefix="/v1")
    control = [Depends(require_token(settings.token)), Depends(bearer_scheme)]
    router.include_router(_datasets(settings, store), dependencies=control)
    router.include_router(_control(), dependencies=control)
    router.include_router(_reading(settings, store))
    return router


def _runs(request: Request) -> RunService:
    return request.app.state.runs


Runs = Annotated[RunService, Depends(_runs)]


def _datasets(settings: OrchestratorSettings, store: ArtifactStore) -> APIRouter:
    router = APIRouter(tags=["datasets"])

    @router.post(
        "/datasets", status_code=201, summary="Upload a file (the body is its bytes)",
        openapi_extra={"requestBody": {"required": True, "content": OCTETS}},
    )  # fmt: skip
    async def upload(  # pyright: ignore[reportUnusedFunction]
        request: Request,
        kind: Annotated[Literal["prompts", "any"], Query(description="`prompts` checks every row.")] = "prompts",
        format: Annotated[Literal["jsonl", "parquet"], Query()] = "jsonl",
        on_error: Annotated[
            Literal["refuse", "skip"], Query(description="A broken line: refuse, or count.")
        ] = "refuse",
    ) -> DatasetInfo:
        limit = settings.dataset_max_bytes
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limit:
            raise TooLarge(
                f"the file has {int(declared):,} bytes, at most {limit:,} are accepted (RATCHET_DATASET_MAX_BYTES)",
                field="body",
            )
        return await receive_dataset(
            store, request.stream(), kind=kind, form=format, on_error=on_error, max_bytes=limit
        )

    return router


def _control() -> APIRouter:
    router = APIRouter(tags=["runs"], prefix="/runs")

    @router.post("", status_code=201, summary="Create a run and start it")
    async def create(body: RunRequest, runs: Runs) -> RunCreated:  # pyright: ignore[reportUnusedFunction]
        return await runs.create(body)

    @router.post("/{run}/iterations", summary="Trigger the next iterations")
    async def iterations(run: RunId, body: IterationsRequest, runs: Runs) -> RunView:  # pyright: ignore[reportUnusedFunction]
        return await runs.add_iterations(run, body)

    @router.post("/{run}/pause", summary="Enqueue nothing more; what runs, ends")
    async def pause(run: RunId, runs: Runs) -> RunView:  # pyright: ignore[reportUnusedFunction]
        return await runs.pause(run)

    @router.post("/{run}/resume", summary="Go on after a pause, a cancellation or a failure")
    async def resume(run: RunId, runs: Runs) -> RunView:  # pyright: ignore[reportUnusedFunction]
        return await runs.resume(run)

    @router.post("/{run}/cancel", summary="Stop what runs, within seconds")
    async def cancel(run: RunId, runs: Runs) -> RunView:  # pyright: ignore[reportUnusedFunction]
        return await runs.cancel(run)

    @router.post("/{run}/rollback", summary="Set the incumbent back, from the next iteration on")
    async def rollback(run: RunId, body: RollbackRequest, runs: Runs) -> RunView:  # pyright: ignore[reportUnusedFunction]
        return await runs.rollback(run, body)

    return router


def _reading(settings: OrchestratorSettings, store: ArtifactStore) -> APIRouter:
    router = APIRouter(tags=["runs"], prefix="/runs")

    @router.get("", summary="All runs, newest first")
    async def all_runs(runs: Runs) -> list[RunView]:  # pyright: ignore[reportUnusedFunction]
        return await runs.list()

    @router.get("/{run}", summary="A run, its current iteration live")
    async def one(run: RunId, runs: Runs) -> RunView:  # pyright: ignore[reportUnusedFunction]
        return await runs.view(run)

    @router.get("/{run}/iterations/{iteration}", summary="One iteration")
    async def iteration(run: RunId, iteration: Iteration, runs: Runs) -> IterationView:  # pyright: ignore[reportUnusedFunction]
        return await runs.iteration(run, iteration)

    @router.get("/{run}/iterations/{iteration}/pairs", summary="The iteration's preference pairs")
    async def pairs(  # pyright: ignore[reportUnusedFunction]
        run: RunId, iteration: Iteration, runs: Runs, offset: Offset = 0, limit: Limit = 50
    ) -> PairPage:
        await asyncio.to_thread(runs.runbook.record, run)
        return await asyncio.to_thread(pair_page, store, run, iteration, offset, limit)

    @router.get("/{run}/iterations/{iteration}/rollouts", summary="The iteration's rollouts with their rewards")
    async def rollouts(  # pyright: ignore[reportUnusedFunction]
        run: RunId, iteration: Iteration, runs: Runs, offset: Offset = 0, limit: Limit = 50,
        evaluation: Annotated[bool, Query(description="The held-out prompts instead.")] = False,
    ) -> RolloutPage:  # fmt: skip
        record = await asyncio.to_thread(runs.runbook.record, run)
        return await asyncio.to_thread(rollout_page, store, record, iteration, offset, limit, evaluation=evaluation)

    @router.get(
        "/{run}/events", summary="Events: history, then live", response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}, "description": "`data` is an `Event` as JSON."}},
    )  # fmt: skip
    async def events(  # pyright: ignore[reportUnusedFunction]
        request: Request, run: RunId, runs: Runs,
        last_event_id: Annotated[str, Header(description="Continue after this event; 0: from the start.")] = "0",
    ) -> StreamingResponse:  # fmt: skip
        await runs.check_events(run, last_event_id)
        lines = event_lines(
            runs.conductor.events, run, last_event_id,
            stop=request.app.state.draining.event, keepalive_seconds=settings.keepalive_seconds,
        )  # fmt: skip
        return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    return router
