"""What is counted of rollbacks: what they did, not how often a job was tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
from prometheus_client import REGISTRY
from pydantic import SecretStr

from services.contracts import layout
from services.contracts.jobs import Job
from services.contracts.recipes import ResolvedModels
from services.contracts.runs import RunRecord
from services.orchestrator import stages
from services.orchestrator.deciding import Deciding
from services.orchestrator.settings import OrchestratorSettings
from services.orchestrator.upstream import Upstream
from services.platform.http import ServiceClient
from services.platform.jobs import JobContext
from services.platform.store import ArtifactStore
from tests.fixtures.fake_services import FakeGenerator, publish_checkpoint
from tests.fixtures.orchestrator_stack import TOKEN, recipe


def rollbacks() -> float:
    return REGISTRY.get_sample_value("ratchet_orchestrator_rollbacks_total") or 0.0


async def test_a_rollback_whose_job_is_tried_again_after_it_took_effect_counts_once(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    record = RunRecord(
        id="r", created_at="2026-11-24", recipe=recipe("datasets/a.jsonl", "datasets/b.jsonl"), prompts_total=24,
        heldout_total=6, models=ResolvedModels(policy="models/sft", reward_model="models/reward"),
    )  # fmt: skip
    store.publish_model(layout.run_file("r"), record)
    first, second = (layout.checkpoint_folder("r", iteration) for iteration in (1, 2))
    for folder in (first, second):
        publish_checkpoint(store, folder, "policy")
    generator = FakeGenerator(store, TOKEN)
    client = ServiceClient(
        "generator", "http://generator", SecretStr(TOKEN), retry=False,
        transport=httpx.ASGITransport(app=generator.app),
    )  # fmt: skip
    settings = OrchestratorSettings(token=SecretStr(TOKEN), store_url=store.url, wait_pause_seconds=0.01)
    upstream = Upstream(client, client, settings)
    unused: Any = None
    deciding = Deciding(store, upstream, unused, unused)
    payload = stages.StageJob(run="r", iteration=3, policy=first).model_dump(mode="json")
    job = Job.model_validate(
        {
            "id": stages.rollback_id("r", 0), "queue": "control", "kind": stages.ROLLBACK_KIND, "payload": payload,
            "topic": "r", "max_attempts": 4, "state": "running", "enqueued_at": 1.0,
        }
    )  # fmt: skip
    await upstream.put_policy(second, record.recipe, trial=False)
    before = rollbacks()
    for fence in (1, 2):  # the first attempt's result did not reach the queue
        assert await deciding.rollback(JobContext(job, fence)) == {"version": layout.version_of(first)}
    assert rollbacks() == before + 1
    assert generator.served[-1] == (layout.version_of(first), False)
    await upstream.put_policy(second, record.recipe, trial=False)
    await deciding.rollback(JobContext(job, 3))
    assert rollbacks() == before + 2
    await client.http.aclose()
