"""The orchestrator's routes. What they do is in `runs`, `datasets`, `pair_reading`, `judgements` and `events`."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from services.orchestrator.routes import datasets, iterations, runs, stack
from services.orchestrator.settings import OrchestratorSettings
from services.platform.auth import bearer_scheme, require_token
from services.platform.openapi import problems
from services.platform.store import ArtifactStore


def routes(settings: OrchestratorSettings, store: ArtifactStore) -> APIRouter:
    """All routes. The run service is on `app.state.runs` from start-up on."""
    router = APIRouter(prefix="/v1")
    control = [Depends(require_token(settings.token)), Depends(bearer_scheme)]
    for controlling in (datasets.controlling(settings, store), runs.controlling(), iterations.controlling()):
        router.include_router(controlling, dependencies=control, responses=problems(401))
    for reading in (runs.reading(settings), iterations.reading(store), stack.reading(settings)):
        router.include_router(reading)
    return router
