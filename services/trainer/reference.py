"""Reference log-probs of preference pairs: computed once, kept beside the pairs under a hash of all they depend on."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from services.contracts.errors import StoreError
from services.contracts.pairs import Pair
from services.platform.store import ArtifactStore

SCHEMA = pa.schema([("chosen_logps", pa.float64()), ("rejected_logps", pa.float64())])


@dataclass(frozen=True)
class ReferenceLogprobs:
    """Sum log-prob of each response under the fixed reference, `[pairs]`, nats, in the order of the kept pairs."""

    chosen: list[float]
    rejected: list[float]


def reference_key(pairs_hashes: Sequence[str], weights: str, max_length: int, dtype: str) -> str:
    """Hash of all that decides the log-probs: pairs and their order, weights, which pairs fit, the arithmetic."""
    content = {"pairs": list(pairs_hashes), "weights": weights, "max_length": max_length, "dtype": dtype}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def reference_path(first_pairs: str, key: str) -> str:
    """Where they are kept: beside the (first) pairs file."""
    folder = first_pairs.rsplit("/", 1)[0] + "/" if "/" in first_pairs else ""
    return f"{folder}reference-{key[:16]}.parquet"


def reference_logprobs(
    store: ArtifactStore,
    path: str,
    pairs: Sequence[Pair],
    load_from: Path,
    *,
    bf16: bool,
    on_pairs: Callable[[int], None] = lambda done: None,
) -> tuple[ReferenceLogprobs, bool]:
    """Read them from `path`, or compute and publish them there. The reference model is freed on return.

    Returns:
        The log-probs, and whether they were computed now.

    Raises:
        StoreError: the stored file is not of these pairs.
    """
    if store.exists(path):
        return _read(store, path, len(pairs)), False
    from services.trainer.checkpoints import load_model
    from services.trainer.forward import response_logprobs

    model = load_model(load_from, "policy")
    if _cuda():
        model.to("cuda")  # pyright: ignore[reportArgumentType]
    prompts = [pair.prompt_ids for pair in pairs]
    sums = response_logprobs(
        model,
        [*prompts, *prompts],
        [*(pair.chosen_ids for pair in pairs), *(pair.rejected_ids for pair in pairs)],
        bf16=bf16,
        on_batch=lambda done: on_pairs(done // 2),
    )
    del model
    table = pa.table({"chosen_logps": sums[: len(pairs)], "rejected_logps": sums[len(pairs) :]}, schema=SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    store.publish_bytes(path, buffer.getvalue())
    # Whoever published first, what is stored is what every attempt trains on.
    return _read(store, path, len(pairs)), True


def _read(store: ArtifactStore, path: str, count: int) -> ReferenceLogprobs:
    try:
        table = pq.read_table(io.BytesIO(store.read_bytes(path)), schema=SCHEMA)
    except pa.ArrowException as error:
        raise StoreError(f"{path} is not readable ({error}); delete it, it will be computed again") from error
    if table.num_rows != count or table["chosen_logps"].null_count or table["rejected_logps"].null_count:
        raise StoreError(
            f"{path} has log-probs of {table.num_rows} pairs, {count} are needed; delete it, it will be made again"
        )
    chosen: Any = table["chosen_logps"].to_pylist()
    rejected: Any = table["rejected_logps"].to_pylist()
    return ReferenceLogprobs(chosen, rejected)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
