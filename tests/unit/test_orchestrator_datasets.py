"""Where an upload is while it comes: in a container the temporary folder is main memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from services.contracts.errors import StoreError
from services.orchestrator import datasets
from services.orchestrator.datasets import receive_dataset
from services.platform.store import ArtifactStore

LINE = json.dumps({"id": "p1", "messages": [{"role": "user", "content": "why?"}]}).encode() + b"\n"


async def upload(store: ArtifactStore) -> str:
    async def body() -> AsyncIterator[bytes]:
        yield LINE

    info = await receive_dataset(store, body(), kind="prompts", form="jsonl", on_error="refuse", max_bytes=1 << 20)
    return info.path


async def test_a_large_upload_waits_on_the_store_s_disk_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    real = tempfile.TemporaryFile

    def temporary(*arguments: Any, **options: Any) -> Any:
        made.append(str(options["dir"]))
        return real(*arguments, **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", temporary)
    monkeypatch.setattr(datasets, "SPOOL_BYTES", 8)
    store = ArtifactStore(str(tmp_path))
    assert store.read_bytes(await upload(store)) == LINE
    assert made == [str(tmp_path / ".work" / "uploads")]
    assert list((tmp_path / ".work" / "uploads").iterdir()) == []


async def test_a_store_that_cannot_hold_an_upload_is_told_as_such(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    (tmp_path / ".work").write_text("in the way")
    with pytest.raises(StoreError, match="cannot be written"):
        await upload(store)
