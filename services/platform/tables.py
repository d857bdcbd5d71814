"""Parquet files of contracts, with explicit schemas: what is written today is read tomorrow, also by `datasets`."""

# pyarrow ships no types:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from services.contracts.conversations import Prompt
from services.contracts.errors import StoreError
from services.contracts.model import Contract
from services.contracts.pairs import Pair
from services.contracts.rollouts import Rollout
from services.contracts.scores import ScoreRow
from services.platform.store import ArtifactStore

Row = TypeVar("Row", bound=Contract)

_TOKENS = pa.list_(pa.int32())
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_RESPONSE = pa.struct(
    [
        ("text", pa.string()),
        ("token_ids", _TOKENS),
        ("logprob", pa.float64()),
        ("finish_reason", pa.string()),
        ("temperature", pa.float64()),
        ("top_p", pa.float64()),
        ("seed", pa.int64()),
        ("index", pa.int32()),
    ]
)
SCHEMAS: dict[type[Contract], pa.Schema] = {
    Prompt: pa.schema([("id", pa.string()), ("messages", _MESSAGES), ("trace_id", pa.string())]),
    Rollout: pa.schema(
        [
            ("prompt_id", pa.string()),
            ("messages", _MESSAGES),
            ("prompt_token_ids", _TOKENS),
            ("responses", pa.list_(_RESPONSE)),
            ("policy_version", pa.string()),
            ("trace_id", pa.string()),
        ]
    ),
    ScoreRow: pa.schema(
        [
            ("prompt_id", pa.string()),
            ("rewards", pa.list_(pa.float64())),
            ("reference_logprobs", pa.list_(pa.float64())),
            ("scorer", pa.string()),
            ("revision", pa.string()),
            ("template_hash", pa.string()),
        ]
    ),
    Pair: pa.schema(
        [
            ("prompt_id", pa.string()),
            ("prompt", _MESSAGES),
            ("chosen", _MESSAGES),
            ("rejected", _MESSAGES),
            ("prompt_ids", _TOKENS),
            ("chosen_ids", _TOKENS),
            ("rejected_ids", _TOKENS),
            ("chosen_reward", pa.float64()),
            ("rejected_reward", pa.float64()),
            ("margin", pa.float64()),
            ("chosen_index", pa.int32()),
            ("rejected_index", pa.int32()),
            ("policy_version", pa.string()),
            ("scorer", pa.string()),
            ("scorer_revision", pa.string()),
            ("trace_id", pa.string()),
        ]
    ),
}


def to_parquet(rows: Sequence[Row], row_type: type[Row], metadata: dict[str, str] | None = None) -> bytes:
    """Rows as the bytes of a Parquet file. The same rows give the same bytes. `metadata` goes to the file's schema."""
    schema = SCHEMAS[row_type]
    if metadata:
        schema = schema.with_metadata({key.encode(): value.encode() for key, value in sorted(metadata.items())})
    table = pa.Table.from_pylist([row.model_dump() for row in rows], schema=schema)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(data: bytes, row_type: type[Row]) -> list[Row]:
    """Rows of a Parquet file, validated."""
    return [row_type.model_validate(row) for row in pq.read_table(io.BytesIO(data)).to_pylist()]


def read_metadata(data: bytes) -> dict[str, str]:
    """The metadata given to `to_parquet`."""
    found = pq.read_schema(io.BytesIO(data)).metadata or {}
    return {key.decode(): value.decode() for key, value in found.items() if not key.startswith(b"ARROW:")}


def publish_rows(
    store: ArtifactStore, path: str, rows: Sequence[Row], row_type: type[Row], metadata: dict[str, str] | None = None
) -> bool:
    """Publish rows as one Parquet file; False when the file was there already."""
    return store.publish_bytes(path, to_parquet(rows, row_type, metadata))


def read_rows(store: ArtifactStore, path: str, row_type: type[Row]) -> list[Row]:
    """Rows of a stored Parquet file. Raises NotFound, StoreError."""
    try:
        return from_parquet(store.read_bytes(path), row_type)
    except (pa.ArrowException, ValueError) as error:
        raise StoreError(f"{path} is not a readable table of {row_type.__name__}: {error}") from error


def read_many(store: ArtifactStore, paths: Iterable[str], row_type: type[Row]) -> list[Row]:
    """Rows of several files, in the order of the paths."""
    return [row for path in paths for row in read_rows(store, path, row_type)]
