"""Rollouts to read, a page at a time. Blocks on I/O: call it in a thread."""

from __future__ import annotations

import pyarrow.parquet as pq

from services.contracts import layout
from services.contracts.rollouts import Rollout
from services.contracts.runs import RolloutPage, RunRecord, ScoredRollout, Stage
from services.contracts.scores import ScoreRow
from services.orchestrator import stages
from services.platform.store import ArtifactStore
from services.platform.tables import read_rows


def rollout_page(
    store: ArtifactStore, record: RunRecord, iteration: int, offset: int, limit: int, *, evaluation: bool
) -> RolloutPage:
    """Rollouts of an iteration, as far as they are published, with their rewards as far as they are scored."""
    total = 0
    rows: list[ScoredRollout] = []
    for chunk in stages.chunks_of(record, Stage.EVALUATE if evaluation else Stage.SAMPLE):
        path = layout.rollouts_file(record.id, iteration, chunk, evaluation=evaluation)
        if not store.exists(path):
            continue
        count = _count(store, path)
        skip = max(0, offset - total)
        if skip < count and len(rows) < limit:
            rollouts = read_rows(store, path, Rollout)[skip : skip + limit - len(rows)]
            rewards = _rewards(store, layout.scores_file(record.id, iteration, chunk, evaluation=evaluation))
            rows += [ScoredRollout(rollout=row, rewards=rewards.get(row.prompt_id)) for row in rollouts]
        total += count
    return RolloutPage(total=total, offset=offset, rows=tuple(rows))


def _count(store: ArtifactStore, path: str) -> int:
    return pq.ParquetFile(store.local_file(path)).metadata.num_rows


def _rewards(store: ArtifactStore, path: str) -> dict[str, tuple[float, ...]]:
    if not store.exists(path):
        return {}
    return {row.prompt_id: row.rewards for row in read_rows(store, path, ScoreRow)}
