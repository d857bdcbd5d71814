"""Uploads."""

# pyright: reportUnusedFunction=false

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request

from services.contracts.errors import TooLarge
from services.contracts.runs import DatasetInfo
from services.orchestrator.datasets import receive_dataset
from services.orchestrator.settings import OrchestratorSettings
from services.platform.openapi import problems
from services.platform.store import ArtifactStore

OCTETS = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


def controlling(settings: OrchestratorSettings, store: ArtifactStore) -> APIRouter:
    """Routes that need the token."""
    router = APIRouter(tags=["datasets"])

    @router.post(
        "/datasets", status_code=201, summary="Upload a file (the body is its bytes)",
        responses=problems(413), openapi_extra={"requestBody": {"required": True, "content": OCTETS}},
    )  # fmt: skip
    async def upload(
        request: Request,
        kind: Annotated[Literal["prompts", "any"], Query(description="`prompts` checks every row.")] = "prompts",
        format: Annotated[Literal["jsonl", "parquet"], Query()] = "jsonl",
        on_error: Annotated[
            Literal["refuse", "skip"], Query(description="A broken line: refuse, or count.")
        ] = "refuse",
    ) -> DatasetInfo:
        """The same bytes get the same path, so an upload may be repeated. The path goes into a recipe."""
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
