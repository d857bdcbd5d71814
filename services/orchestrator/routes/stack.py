"""The stack as a whole: how its services are, and what happens in any run."""

# pyright: reportUnusedFunction=false

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from services.contracts.health import ServiceHealth
from services.contracts.layout import ALL_RUNS
from services.orchestrator.events import EVENT_STREAM, stream_events
from services.orchestrator.routes.parameters import LastEventId, Runs
from services.orchestrator.service_health import ServiceHealthChecks
from services.orchestrator.settings import OrchestratorSettings
from services.platform.openapi import problems


def reading(settings: OrchestratorSettings) -> APIRouter:
    """Routes that anybody may read."""
    router = APIRouter(tags=["stack"])

    @router.get("/services", summary="How the services are")
    async def services(request: Request) -> list[ServiceHealth]:
        """Asked at once, each with a deadline; one that does not answer is `unreachable`, and the answer is 200."""
        checks: ServiceHealthChecks = request.app.state.service_health
        return list(await checks.look())

    @router.get(
        "/events", summary="Changes of all runs: history, then live", response_class=StreamingResponse,
        responses={**EVENT_STREAM, **problems(503)},
    )  # fmt: skip
    async def events(request: Request, runs: Runs, last_event_id: LastEventId = "0") -> StreamingResponse:
        """`run.created`, `run.status`, `run.control` and `run.judged` of every run, with the run's id in `data.run`."""
        await runs.check_stream(ALL_RUNS, last_event_id)
        return stream_events(request, runs.conductor.events, ALL_RUNS, last_event_id, settings.keepalive_seconds)

    return router
