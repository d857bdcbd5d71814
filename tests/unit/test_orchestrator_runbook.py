"""The runbook: what is remembered of the store, read from several threads at once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from services.contracts import layout
from services.contracts.errors import NotFound
from services.contracts.recipes import ResolvedModels
from services.contracts.runs import IterationMetrics, IterationRecord, RunControl, RunRecord
from services.orchestrator.runbook import Runbook
from services.platform.store import ArtifactStore
from tests.fixtures.orchestrator_stack import recipe


class SlowStore(ArtifactStore):
    """Gives other threads time to come between a read and what follows it."""

    def read_model(self, path: str, model: Any) -> Any:
        """As the store, slowly."""
        found = super().read_model(path, model)
        time.sleep(0.005)
        return found


@pytest.fixture
def runbook(tmp_path: Path) -> Runbook:
    store = SlowStore(str(tmp_path))
    record = RunRecord(
        id="r", created_at="2026-11-24", recipe=recipe("datasets/a.jsonl", "datasets/b.jsonl"), prompts_total=24,
        heldout_total=6, models=ResolvedModels(policy="models/sft", reward_model="models/reward"),
    )  # fmt: skip
    store.publish_model(layout.run_file("r"), record)
    for t in range(4):
        iteration = IterationRecord(
            run_id="r", iteration=t, version=f"r/iter-{t}", incumbent="x", serving="x", decision="promoted",
            reasons=(), metrics=IterationMetrics(), decided_at="2026-11-24",
        )  # fmt: skip
        store.publish_model(layout.iteration_file("r", t), iteration)
    return Runbook(store)


def test_iterations_keep_their_numbers_whoever_reads_them_at_once(runbook: Runbook) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: runbook.decided("r"), range(8)))
    for decided in found:
        assert {t: record.iteration for t, record in decided.items()} == {0: 0, 1: 1, 2: 2, 3: 3}


def test_a_refresh_never_undoes_a_control_that_was_just_written(runbook: Runbook) -> None:
    runbook.write_control("r", RunControl(iterations=0))
    with ThreadPoolExecutor(8) as pool:
        for count in range(1, 20):
            refreshing = [pool.submit(runbook.refresh) for _ in range(3)]
            runbook.write_control("r", RunControl(iterations=count))
            assert runbook.control("r").iterations == count
            for one in refreshing:
                one.result()
            assert runbook.control("r").iterations == count


def test_a_run_without_run_json_does_not_exist(runbook: Runbook) -> None:
    runbook.store.publish_bytes(layout.pool_file("half"), b"x")
    runbook.refresh()
    assert runbook.ids() == ["r"]
    with pytest.raises(NotFound, match="there is no run 'half'"):
        runbook.record("half")


def test_a_run_whose_record_is_broken_does_not_stop_the_others(runbook: Runbook) -> None:
    runbook.store.publish_bytes(layout.run_file("broken"), b"{}")
    runbook.refresh()
    assert runbook.ids() == ["r"]


def test_without_a_control_file_the_recipe_says_how_many_iterations(runbook: Runbook) -> None:
    assert runbook.control("r") == RunControl(iterations=2)


def test_a_change_starts_from_what_the_store_has_not_from_what_was_remembered(runbook: Runbook) -> None:
    assert runbook.control("r").iterations == 2
    Runbook(runbook.store).write_control("r", RunControl(iterations=5))  # another orchestrator
    assert runbook.reread_control("r").iterations == 5
    assert runbook.control("r").iterations == 5
