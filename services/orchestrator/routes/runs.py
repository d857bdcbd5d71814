"""Runs: create, look at, follow, control."""

# pyright: reportUnusedFunction=false

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from services.contracts.runs import IterationsRequest, RollbackRequest, RunCreated, RunRequest, RunView, ShownIterations
from services.orchestrator.events import EVENT_STREAM, stream_events
from services.orchestrator.routes.parameters import LastEventId, RunId, Runs
from services.orchestrator.settings import OrchestratorSettings
from services.platform.openapi import problems


def controlling() -> APIRouter:
    """Routes that need the token."""
    router = APIRouter(tags=["runs"], prefix="/runs", responses=problems(503))

    @router.post("", status_code=201, summary="Create a run and start it", responses=problems(409))
    async def create(body: RunRequest, runs: Runs) -> RunCreated:
        """The same id with the same recipe is one run, so the request may be repeated; with another recipe: 409.

        422 also when `recipe.dpo.report_to` names a tracker that the trainer does not have. When the trainer does not
        answer, the run is created and `warnings` says that this is not known.
        """
        return await runs.create(body)

    @router.post("/{run}/iterations", summary="Trigger the next iterations", responses=problems(404, 409))
    async def iterations(run: RunId, body: IterationsRequest, runs: Runs) -> RunView:
        """Asks for `count` more iterations than were asked for before."""
        return await runs.add_iterations(run, body)

    @router.post("/{run}/pause", summary="Enqueue nothing more; what runs, ends", responses=problems(404))
    async def pause(run: RunId, runs: Runs) -> RunView:
        """Chunks and trainings under way are finished; `resume` goes on after them."""
        return await runs.pause(run)

    @router.post(
        "/{run}/resume", summary="Go on after a pause, a cancellation or a failure", responses=problems(404, 409)
    )
    async def resume(run: RunId, runs: Runs) -> RunView:
        """Failed and cancelled jobs get all their attempts again. What is published is not done again."""
        return await runs.resume(run)

    @router.post("/{run}/cancel", summary="Stop what runs, within seconds", responses=problems(404))
    async def cancel(run: RunId, runs: Runs) -> RunView:
        """What is published stays, and `resume` goes on from there."""
        return await runs.cancel(run)

    @router.post(
        "/{run}/rollback", summary="Set the incumbent back, from the next iteration on", responses=problems(404)
    )
    async def rollback(run: RunId, body: RollbackRequest, runs: Runs) -> RunView:
        """An iteration under way is decided first. Iteration 0 is the initial policy."""
        return await runs.rollback(run, body)

    return router


def reading(settings: OrchestratorSettings) -> APIRouter:
    """Routes that anybody may read."""
    router = APIRouter(tags=["runs"], prefix="/runs", responses=problems(503))

    @router.get("", summary="All runs, newest first")
    async def all_runs(
        runs: Runs, iterations: Annotated[ShownIterations, Query(description="Which of their iterations.")] = "all"
    ) -> list[RunView]:
        """A run that cannot be read is left out; the service's log says why."""
        return await runs.list(iterations)

    @router.get("/{run}", summary="A run, its current iteration live", responses=problems(404))
    async def one(run: RunId, runs: Runs) -> RunView:
        """With all iterations: decided ones with their record and judgements, the current one stage by stage."""
        return await runs.view(run)

    @router.get(
        "/{run}/events", summary="Events of a run: history, then live", response_class=StreamingResponse,
        responses={**EVENT_STREAM, **problems(404)},
    )  # fmt: skip
    async def events(request: Request, run: RunId, runs: Runs, last_event_id: LastEventId = "0") -> StreamingResponse:
        """Server-sent events, endless. A reader that was cut off continues with `Last-Event-ID`."""
        await runs.check_events(run, last_event_id)
        return stream_events(request, runs.conductor.events, run, last_event_id, settings.keepalive_seconds)

    return router
