"""What several routes take: path and query parameters, and the run service."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Header, Path, Query, Request

from services.contracts.browsing import MAX_PAGE
from services.contracts.model import Name
from services.orchestrator.runs import RunService

RunId = Annotated[Name, Path(description="Id of the run.")]
Iteration = Annotated[int, Path(ge=0, description="0 is the baseline.")]
Offset = Annotated[int, Query(ge=0, description="Rows to skip.")]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]
LastEventId = Annotated[str, Header(description="Continue after this event; 0: from the oldest that is kept.")]


def _runs(request: Request) -> RunService:
    return request.app.state.runs


Runs = Annotated[RunService, Depends(_runs)]
