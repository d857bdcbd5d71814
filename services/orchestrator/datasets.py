"""Uploaded files: streamed to a temporary file, checked, and published under their own hash."""

from __future__ import annotations

import asyncio
import hashlib
import re
import tempfile
from collections.abc import AsyncIterable
from typing import Any, Literal

from services.contracts.conversations import Prompt
from services.contracts.errors import InvalidInput, NotFound, StoreError, TooLarge
from services.contracts.recipes import PromptSource
from services.contracts.runs import DatasetInfo
from services.orchestrator.prompts import Format, Reading, read_objects, read_prompts
from services.platform.store import ArtifactStore

SPOOL_BYTES = 4 * 1024 * 1024
"""Smaller uploads stay in memory; larger ones are a file without a name, on the disk of a local store."""
DATASET = re.compile(r"datasets/[A-Za-z0-9][A-Za-z0-9._-]*\.(jsonl|parquet)")
SHOWN_SKIPPED = 100
OnError = Literal["refuse", "skip"]


async def receive_dataset(
    store: ArtifactStore, body: AsyncIterable[bytes], *, kind: Literal["prompts", "any"], form: Format,
    on_error: OnError, max_bytes: int,
) -> DatasetInfo:  # fmt: skip
    """Take an upload, check it, and publish it as `datasets/{sha256}.{jsonl,parquet}`.

    The file is kept as it was sent, broken lines included: a recipe that names it says itself whether to skip them.

    Raises:
        TooLarge: more than `max_bytes`; told as soon as they have come.
        InvalidInput: a broken line, by its number; an empty file.
        StoreError: the store cannot be written.
    """
    try:
        folder = await asyncio.to_thread(store.work_folder, "uploads")
    except OSError as error:
        raise StoreError(f"the artifact store {store.url} cannot be written: {error.strerror or error}") from error
    with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES, dir=str(folder)) as spool:
        size, digest = 0, hashlib.sha256()
        async for piece in body:
            size += len(piece)
            if size > max_bytes:
                raise TooLarge(
                    f"the file is larger than {max_bytes:,} bytes; split it, or raise RATCHET_DATASET_MAX_BYTES",
                    field="body",
                )
            digest.update(piece)
            await asyncio.to_thread(spool.write, piece)
        return await asyncio.to_thread(_publish, store, spool, digest.hexdigest(), kind, form, on_error)


def _publish(
    store: ArtifactStore, spool: Any, digest: str, kind: Literal["prompts", "any"], form: Format, on_error: OnError
) -> DatasetInfo:
    spool.seek(0)
    data: bytes = spool.read()
    if not data.strip():
        raise InvalidInput("the body is empty: send the file's bytes as the body", field="body")
    read = read_prompts if kind == "prompts" else read_objects
    reading = read(data, form, on_error, field="body")
    path = f"datasets/{digest}.{form}"
    store.publish_bytes(path, data)
    return DatasetInfo(
        path=path, rows=len(reading.rows), kind=kind, skipped=reading.skipped[:SHOWN_SKIPPED],
        skipped_count=reading.skipped_count,
    )  # fmt: skip


def read_source(store: ArtifactStore, source: PromptSource, field: str) -> Reading[Prompt]:
    """The prompts a recipe names.

    Raises:
        InvalidInput: not an uploaded file, or one with broken lines that are not to be skipped.
    """
    match = DATASET.fullmatch(source.path)
    if match is None:
        raise InvalidInput(
            f"{source.path!r} is not an uploaded file. Upload it (POST /v1/datasets gives a path 'datasets/….jsonl'), "
            "or start the run with 'ratchet run', which uploads local files",
            field=f"{field}.path",
        )
    try:
        data = store.read_bytes(source.path)
    except NotFound as error:
        raise InvalidInput(
            f"{source.path} is not in the artifact store; upload it with POST /v1/datasets first", field=f"{field}.path"
        ) from error
    return read_prompts(data, "jsonl" if match[1] == "jsonl" else "parquet", source.on_error, field=f"{field}.path")
