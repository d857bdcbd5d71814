"""The orchestrator's API: uploads, refusals, pages, events, tokens."""

from __future__ import annotations

import asyncio
import io
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
import uvicorn
from httpx_sse import aconnect_sse
from redis.asyncio import Redis

from ratchet.local.redis_server import RedisServer
from services.contracts import layout
from services.contracts.browsing import PairPage
from services.contracts.jobs import Event
from services.contracts.runs import RolloutPage
from tests.fixtures.fake_services import publish_checkpoint
from tests.fixtures.orchestrator_stack import Stack, jsonl, recipe


@pytest.fixture
async def stack(tmp_path: Path, redis_client: Redis, redis_server: RedisServer) -> AsyncIterator[Stack]:
    stack = Stack(tmp_path, redis_server.url, dataset_max_bytes=10_000, keepalive_seconds=0.2)
    async with stack.running():
        yield stack


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/datasets"), ("POST", "/v1/runs"), *(("POST", f"/v1/runs/r/{verb}") for verb in (
        "pause", "resume", "cancel", "rollback", "iterations"))],
)  # fmt: skip
async def test_a_control_route_needs_the_token(stack: Stack, method: str, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        answer = await stack.http.request(method, path, headers=headers, json={})
        assert answer.status_code == 401, path
        assert answer.json()["code"] == "unauthorized"


async def test_an_upload_is_content_addressed_and_counts_its_rows(stack: Stack) -> None:
    first = await stack.post("/v1/datasets", content=jsonl([{"prompt": "a"}, {"question": "b"}]), expect=201)
    again = await stack.post("/v1/datasets", content=jsonl([{"prompt": "a"}, {"question": "b"}]), expect=201)
    assert first == again
    assert first["rows"] == 2
    assert stack.store.exists(first["path"])


async def test_a_broken_upload_names_its_line_or_is_skipped_and_counted(stack: Stack) -> None:
    data = b'{"prompt": "fine"}\n{"prompt": ""}\n'
    refused = await stack.post("/v1/datasets", content=data, expect=422)
    assert "line 2: prompt is empty" in refused["detail"]
    taken = await stack.post("/v1/datasets?on_error=skip", content=data, expect=201)
    assert (taken["rows"], taken["skipped_count"], taken["skipped"]) == (1, 1, ["line 2: prompt is empty"])


async def test_empty_and_too_large_uploads_are_refused(stack: Stack) -> None:
    assert "empty" in (await stack.post("/v1/datasets", content=b"", expect=422))["detail"]
    large = await stack.post("/v1/datasets", content=b"x" * 10_001, expect=413)
    assert "10,000" in large["detail"]

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b"y" * 1000

    chunked = await stack.post("/v1/datasets", content=pieces(), expect=413)
    assert "RATCHET_DATASET_MAX_BYTES" in chunked["detail"]


RUNS = ("one", "two", "three")


def body(prompts: str, heldout: str, run: str | None = "r", **changes: Any) -> dict[str, Any]:
    return {"id": run, "recipe": {**recipe(prompts, heldout).model_dump(mode="json"), **changes}}


async def test_a_run_that_cannot_work_is_refused_with_the_field_and_the_remedy(stack: Stack) -> None:
    prompts, heldout = await stack.upload(24), await stack.upload(6, 1000)
    few = await stack.upload(9, 2000)
    publish_checkpoint(stack.store, "models/short", "policy", config='{"max_position_embeddings": 16}')
    cases: list[tuple[dict[str, Any], str, str]] = [
        (body("my/prompts.jsonl", heldout), "recipe.prompts.path", "ratchet run"),
        (body("datasets/absent.jsonl", heldout), "recipe.prompts.path", "upload it"),
        (body(few, heldout), "recipe.sampling.prompts_per_iteration", "the pool has 9"),
        (body(prompts, heldout, policy="/models/llama"), "recipe.policy", "ratchet run"),
        (body(prompts, heldout, policy="models/short"), "recipe.dpo.max_length", "has 16 positions"),
        (body(prompts, heldout, typo=1), "recipe.typo", "unknown key"),
        (body(prompts, heldout, gate={"max_kl": 1.0}, evaluation={"measure_kl": False}), "recipe", "measure_kl"),
        (body(prompts, heldout, run="../etc"), "id", "pattern"),
        (body(prompts, heldout, run="models"), "id", "cannot be called 'models'"),
        (body(prompts, heldout, run="runs"), "id", "events of all runs"),
    ]
    for request, field, says in cases:
        problem = await stack.post("/v1/runs", json=request, expect=422)
        assert problem["field"] == field
        assert says in problem["detail"]
    assert await stack.get("/v1/runs") == []
    assert not stack.store.exists(layout.run_file("r"))


def reporting(*trackers: str) -> dict[str, Any]:
    return {"learning_rate": 5e-7, "train_batch_size": 4, "max_length": 128, "report_to": trackers}


async def test_a_run_that_reports_to_a_tracker_the_trainer_lacks_is_refused_before_it_samples(stack: Stack) -> None:
    prompts, heldout = await stack.upload(24), await stack.upload(6, 1000)
    request = body(prompts, heldout, dpo=reporting("tensorboard", "wandb"), iterations=0)
    problem = await stack.post("/v1/runs", json=request, expect=422)
    assert problem["field"] == "recipe.dpo.report_to"
    assert "pip install wandb" in problem["detail"]
    assert not stack.store.exists(layout.run_file("r"))
    stack.trainer.trackers = ("tensorboard", "wandb")
    assert (await stack.post("/v1/runs", json=request, expect=201))["warnings"] == []
    stack.trainer.trackers = ()  # what is there stays
    await stack.post("/v1/runs", json=request, expect=201)


async def test_a_trainer_that_is_away_does_not_keep_a_run_with_trackers_from_being_created(
    tmp_path: Path, redis_client: Redis, redis_server: RedisServer
) -> None:
    stack = Stack(tmp_path, redis_server.url, trainer_url=None)
    async with stack.running():
        prompts, heldout = await stack.upload(24), await stack.upload(6, 1000)
        request = body(prompts, heldout, dpo=reporting("wandb"), iterations=0)
        (warning,) = (await stack.post("/v1/runs", json=request, expect=201))["warnings"]
        assert "whether the trainer has them is not known" in warning
        assert (await stack.view("r")).warnings == (warning,)


async def test_creating_a_run_twice_is_one_run_and_another_recipe_is_a_conflict(stack: Stack) -> None:
    prompts, heldout = await stack.upload(24), await stack.upload(6, 1000)
    request = body(prompts, heldout, iterations=0)
    first = await stack.post("/v1/runs", json=request, expect=201)
    second = await stack.post("/v1/runs", json=request, expect=201)
    assert first["id"] == second["id"] == "r"
    other = await stack.post("/v1/runs", json=body(prompts, heldout, seed=8), expect=409)
    assert "another recipe" in other["detail"]
    assert len(await stack.get("/v1/runs")) == 1


async def test_warnings_tell_of_reuse_duplicates_and_leaks(stack: Stack) -> None:
    rows = [{"prompt": f"question {number}?"} for number in [*range(11), 3, 1000]]
    prompts = (await stack.post("/v1/datasets", content=jsonl(rows), expect=201))["path"]
    heldout = await stack.upload(6, 1000)
    created = await stack.post("/v1/runs", json=body(prompts, heldout, run=None), expect=201)
    text = " ".join(created["warnings"])
    assert "1 of 13 training prompts occur more than once" in text
    assert "1 training prompts are among the held-out" in text
    assert "need 20, and the pool has 11" in text
    assert created["id"].startswith("test-")
    assert (await stack.view(created["id"])).warnings == tuple(created["warnings"])


async def test_models_are_imported_by_the_trainer_first(stack: Stack) -> None:
    await stack.start(policy="hub:owner/sft", iterations=0)
    view = await stack.status("idle")
    assert [job.source for job in stack.trainer.imports] == ["hub:owner/sft"]
    assert view.incumbent == "models/owner--sft"


async def test_what_does_not_exist_is_404(stack: Stack) -> None:
    for path in (
        "/v1/runs/none",
        "/v1/runs/none/iterations/0",
        "/v1/runs/none/events",
        "/v1/runs/none/iterations/0/pairs",
    ):
        assert (await stack.get(path, expect=404))["code"] == "not-found"
    await stack.post("/v1/runs/none/pause", expect=404)
    await stack.start(iterations=0)
    assert "0 to 0" in (await stack.get("/v1/runs/r/iterations/5", expect=404))["detail"]
    assert "no pairs" in (await stack.get("/v1/runs/r/iterations/0/pairs", expect=404))["detail"]


async def test_pairs_and_rollouts_are_read_in_pages(stack: Stack) -> None:
    await stack.start(iterations=1)
    await stack.status("idle")
    place = "/v1/runs/r/iterations/1"
    whole = PairPage.model_validate(await stack.get(f"{place}/pairs"))
    page = PairPage.model_validate(await stack.get(f"{place}/pairs?offset=3&limit=2"))
    assert (page.total, page.offset, page.rows) == (10, 3, whole.rows[3:5])
    rollouts = RolloutPage.model_validate(await stack.get(f"{place}/rollouts"))
    across = RolloutPage.model_validate(await stack.get(f"{place}/rollouts?offset=3&limit=4"))
    assert rollouts.total == across.total == 10
    assert across.rows == rollouts.rows[3:7], "a page may span chunks"
    assert all(row.rewards and len(row.rewards) == 4 for row in rollouts.rows)
    assert RolloutPage.model_validate(await stack.get(f"{place}/rollouts?evaluation=true")).total == 6
    await stack.get(f"{place}/pairs?limit=0", expect=422)


async def test_the_same_recipe_and_seed_give_identical_pairs_but_for_their_trace_ids(stack: Stack) -> None:
    await stack.start("one", iterations=1, pairs={"rule": "random"})
    await stack.start("two", iterations=1, pairs={"rule": "random"})
    await stack.start("three", iterations=1, pairs={"rule": "random"}, seed=8)
    for run in RUNS:
        await stack.until(lambda view: view.iterations_decided == 1, run)
    files = [pq.read_table(io.BytesIO(stack.store.read_bytes(layout.pairs_file(run, 1)))) for run in RUNS]
    assert {"prompt", "chosen", "rejected", "chosen_ids", "rejected_ids", "trace_id"} <= set(files[0].column_names)
    one, two, three = (file.drop_columns(["trace_id"]).replace_schema_metadata() for file in files)
    assert one.equals(two)
    assert not one.equals(three)


async def test_events_come_as_history_then_live_and_continue_after_the_last_one_seen(stack: Stack) -> None:
    await stack.start(iterations=1)
    await stack.status("idle")
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(stack.app, lifespan="off", log_config=None, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=20) as http:

            async def read(until: str, headers: dict[str, str]) -> list[Event]:
                found: list[Event] = []
                async with aconnect_sse(http, "GET", "/v1/runs/r/events", headers=headers) as source:
                    async for sse in source.aiter_sse():
                        event = Event.model_validate(json.loads(sse.data))
                        assert (sse.id, sse.event) == (event.id, event.type)
                        found.append(event)
                        if event.type == until and event.data.get("iteration", 1) == 1:
                            return found
                raise AssertionError("the stream ended")

            history = await read("iteration.decided", {})
            kinds = [event.type for event in history]
            assert "run.created" in kinds
            assert {"job.queued", "job.started", "job.succeeded", "run.status"} <= set(kinds)
            waiting = asyncio.create_task(read("run.control", {"Last-Event-ID": history[-1].id}))
            await stack.post("/v1/runs/r/pause")
            live = await waiting
            assert not {event.id for event in live} & {event.id for event in history}
            assert live[-1].data == {"action": "pause"}
            bad = await http.get("/v1/runs/r/events", headers={"Last-Event-ID": "yesterday"})
            assert bad.status_code == 422
            async with aconnect_sse(http, "GET", "/v1/runs/r/events") as source:
                stack.app.state.draining.event.set()
                async for _ in source.aiter_sse():
                    pass  # ends by itself
    finally:
        server.should_exit = True
        await serving


async def test_health_is_what_it_says(stack: Stack) -> None:
    assert (await stack.get("/health/ready"))["status"] == "ok"
    assert (await stack.get("/health/live"))["status"] == "ok"
    assert "ratchet_orchestrator_runs" in (await stack.http.get("/metrics")).text
    ended = asyncio.create_task(asyncio.sleep(0), name="conductor")
    await ended
    stack.app.state.tasks.append(ended)
    assert "conductor has ended" in (await stack.get("/health/live", expect=503))["detail"]
