"""What the dashboard reads of the orchestrator: pairs, judgements, services, and the events of all runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from pydantic import TypeAdapter
from redis.asyncio import Redis

from ratchet.local.redis_server import RedisServer
from services.contracts import layout
from services.contracts.browsing import PairDetail, PairPage
from services.contracts.health import ServiceHealth
from services.contracts.judgements import Judgement
from services.contracts.rollouts import Rollout
from services.contracts.scores import ScoreRow
from services.orchestrator.events import event_lines
from services.platform.tables import read_rows
from tests.fixtures.orchestrator_stack import Stack

PLACE = "/v1/runs/r/iterations/1"
SERVICES = TypeAdapter(list[ServiceHealth])
VERDICT = {"win_rate": 0.62, "prompts": 200, "low": 0.55, "high": 0.69}


@pytest.fixture
async def stack(tmp_path: Path, redis_client: Redis, redis_server: RedisServer) -> AsyncIterator[Stack]:
    stack = Stack(tmp_path, redis_server.url)
    async with stack.running():
        yield stack


async def test_pairs_are_filtered_sorted_and_named_by_their_row(stack: Stack) -> None:
    await stack.start(iterations=1)
    await stack.status("idle")
    whole = PairPage.model_validate(await stack.get(f"{PLACE}/pairs"))
    assert whole.numbers == tuple(range(10))
    page = PairPage.model_validate(await stack.get(f"{PLACE}/pairs?sort=margin&descending=true&limit=3&offset=1"))
    ranked = sorted(range(10), key=lambda number: (-whole.rows[number].margin, number))
    assert (page.total, page.numbers) == (10, tuple(ranked[1:4]))
    text = whole.rows[4].chosen[0].content
    found = PairPage.model_validate(await stack.get(f"{PLACE}/pairs?search={text.upper()}"))
    assert 4 in found.numbers
    assert found.total < 10
    for query, field in (
        ("sort=beauty", "sort"), ("colour=red", "colour"), ("min_margin=nan", "min_margin"), ("offset=-1", "offset"),
        ("limit=1001", "limit"), ("min_margin=2&max_margin=1", "min_margin"), (f"search={'x' * 201}", "search"),
    ):  # fmt: skip
        assert (await stack.get(f"{PLACE}/pairs?{query}", expect=422))["field"] == field


async def test_a_pair_is_read_among_the_responses_it_was_chosen_from(stack: Stack) -> None:
    await stack.start(iterations=1)
    await stack.status("idle")
    chunks = range(3)
    rollouts = {
        row.prompt_id: row for c in chunks for row in read_rows(stack.store, layout.rollouts_file("r", 1, c), Rollout)
    }
    scores = {
        row.prompt_id: row for c in chunks for row in read_rows(stack.store, layout.scores_file("r", 1, c), ScoreRow)
    }
    for number in range(10):
        detail = PairDetail.model_validate(await stack.get(f"{PLACE}/pairs/{number}"))
        pair, marked = detail.pair, {one.role: one for one in detail.responses}
        assert tuple(one.text for one in detail.responses) == tuple(
            one.text for one in rollouts[pair.prompt_id].responses
        )
        assert tuple(one.reward for one in detail.responses) == scores[pair.prompt_id].rewards
        assert (marked["chosen"].text, marked["chosen"].reward) == (pair.chosen[0].content, pair.chosen_reward)
        assert (marked["rejected"].text, marked["rejected"].reward) == (pair.rejected[0].content, pair.rejected_reward)
    assert (await stack.get(f"{PLACE}/pairs/10", expect=404))["field"] == "number"
    assert (await stack.get("/v1/runs/r/iterations/0/pairs/0", expect=404))["field"] == "iteration"
    await stack.get("/v1/runs/none/iterations/1/pairs/0", expect=404)


async def test_a_judgement_is_recorded_once_and_shown_at_once_everywhere(stack: Stack) -> None:
    await stack.start(iterations=1)
    await stack.status("idle")
    assert (await stack.view()).iterations[1].judgements == ()
    answer = await stack.http.put(f"{PLACE}/judgements/gold", json=VERDICT)
    assert answer.status_code == 401
    first = Judgement.model_validate(await stack.put(f"{PLACE}/judgements/gold", json=VERDICT))
    again = Judgement.model_validate(await stack.put(f"{PLACE}/judgements/gold", json=VERDICT))
    assert first == again == stack.store.read_model(layout.judgement_file("r", 1, "gold"), Judgement)
    other = await stack.put(f"{PLACE}/judgements/gold", json={**VERDICT, "win_rate": 0.4}, expect=409)
    assert "win rate of 0.62" in other["detail"]
    person = Judgement.model_validate(await stack.put(f"{PLACE}/judgements/a-person", json=VERDICT))
    expected = (person, first)
    assert (await stack.view()).iterations[1].judgements == expected
    shown = [Judgement.model_validate(one) for one in (await stack.get(PLACE))["judgements"]]
    assert tuple(shown) == expected
    (listed,) = await stack.get("/v1/runs")
    assert len(listed["iterations"][1]["judgements"]) == 2
    events = await stack.app.state.conductor.events.read("r")
    assert [event.data for event in events if event.type == "run.judged"] == [
        {"iteration": 1, "judge": "gold", "win_rate": 0.62}, {"iteration": 1, "judge": "a-person", "win_rate": 0.62},
    ]  # fmt: skip


async def test_judgements_are_known_again_after_a_restart_and_a_broken_one_is_left_out(stack: Stack) -> None:
    await stack.start(iterations=0)
    await stack.status("idle")
    await stack.put("/v1/runs/r/iterations/0/judgements/gold", json=VERDICT)
    stack.store.publish_bytes(layout.judgement_file("r", 0, "broken"), b"{}")
    async with stack.running():
        assert [one.judge for one in (await stack.view()).iterations[0].judgements] == ["gold"]


async def test_only_a_decided_iteration_is_judged(stack: Stack) -> None:
    stack.generator.hold.clear()
    await stack.start(iterations=1)
    early = await stack.put(f"{PLACE}/judgements/gold", json=VERDICT, expect=422)
    assert (early["field"], "not decided yet" in early["detail"]) == ("iteration", True)
    assert (await stack.put("/v1/runs/r/iterations/7/judgements/gold", json=VERDICT, expect=404))[
        "field"
    ] == "iteration"
    await stack.put("/v1/runs/none/iterations/0/judgements/gold", json=VERDICT, expect=404)
    bad = await stack.put(f"{PLACE}/judgements/gold", json={**VERDICT, "win_rate": 1.5}, expect=422)
    assert bad["field"] == "win_rate"
    stack.generator.hold.set()


async def test_the_services_are_told_with_what_they_serve(stack: Stack) -> None:
    found = {one.name: one for one in SERVICES.validate_python(await stack.get("/v1/services"))}
    assert list(found) == ["orchestrator", "generator", "reward", "trainer", "redis", "store"]
    assert (found["generator"].state, found["trainer"].state) == ("not_ready", "ready")
    await stack.start(iterations=0)
    await stack.status("idle")
    found = {one.name: one for one in SERVICES.validate_python(await stack.get("/v1/services"))}
    assert {one.state for one in found.values()} == {"ready"}
    assert found["generator"].serving == ("models/sft",)
    assert "default: models/reward" in found["reward"].serving


async def test_a_run_that_cannot_be_read_does_not_hide_the_others(stack: Stack) -> None:
    await stack.start("good", iterations=0)
    await stack.status("idle", "good")
    await stack.start("bad", iterations=0)
    await stack.status("idle", "bad")
    record = Path(stack.store.url) / layout.iteration_file("bad", 0)
    record.write_text("{broken")
    async with stack.running():
        assert [view["id"] for view in await stack.get("/v1/runs")] == ["good"]
        assert "iteration.json is not a valid" in (await stack.get("/v1/runs/bad", expect=500))["detail"]


async def test_a_list_of_runs_carries_as_many_iterations_as_asked_for(stack: Stack) -> None:
    await stack.start(iterations=1)
    await stack.status("idle")
    shown: dict[str, list[int]] = {}
    for asked in ("all", "latest", "none"):
        (view,) = await stack.get(f"/v1/runs?iterations={asked}")
        shown[asked] = [one["iteration"] for one in view["iterations"]]
    assert shown == {"all": [0, 1], "latest": [1], "none": []}
    assert (await stack.get("/v1/runs?iterations=some", expect=422))["field"] == "iterations"


async def test_one_stream_tells_of_every_run_and_continues_after_the_last_event(stack: Stack) -> None:
    for run in ("one", "two"):
        await stack.start(run, iterations=0)
    for run in ("one", "two"):
        await stack.status("idle", run)
    await stack.post("/v1/runs/two/pause")
    events = await stack.app.state.conductor.events.read(layout.ALL_RUNS)
    for run in ("one", "two"):
        told = [event.type for event in events if event.data["run"] == run]
        assert told[0] == "run.created"
        assert {"run.status", "iteration.decided"} <= set(told)
    control = next(event for event in events if event.type == "run.control")
    assert control.data == {"run": "two", "action": "pause"}
    stop = asyncio.Event()
    lines = event_lines(
        stack.app.state.conductor.events, layout.ALL_RUNS, events[-2].id, stop=stop, keepalive_seconds=30.0
    )
    async for line in lines:
        if line.startswith("id: "):
            assert events[-1].id in line, "what was seen before does not come again"
            break
    stop.set()
    await lines.aclose()  # pyright: ignore[reportAttributeAccessIssue]
    assert (await stack.http.get("/v1/events", headers={"Last-Event-ID": "yesterday"})).status_code == 422


async def test_every_route_is_documented_with_summary_tag_and_problems(stack: Stack) -> None:
    document = (await stack.http.get("/openapi.json")).json()
    paths = {route.path for route in stack.app.routes if isinstance(route, APIRoute) and route.path.startswith("/v1/")}
    assert {"/v1/services", "/v1/events", "/v1/runs/{run}/iterations/{iteration}/pairs/{number}"} <= paths
    for path in paths:
        for method, operation in document["paths"][path].items():
            place = f"{method.upper()} {path}"
            assert operation["summary"], place
            assert operation["tags"], place
            statuses = operation["responses"]
            assert "{" not in path or "404" in statuses, place
            assert ("401" in statuses) == ("security" in operation), place
            for status, response in statuses.items():
                content: dict[str, Any] = response["content"]
                if int(status) >= 400:
                    assert content == {
                        "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
                    }, f"{place} {status}"
                elif "application/json" in content:
                    assert content["application/json"]["schema"], place
    schemas = document["components"]["schemas"]
    assert {"Problem", "FieldError", "PairDetail", "Judgement", "ServiceHealth"} <= schemas.keys()
    assert "HTTPValidationError" not in schemas
