"""Pause, resume, cancel, rollback, and what happens when something fails or is gone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from ratchet.local.redis_server import RedisServer
from services.contracts import layout
from services.contracts.checkpoints import PolicyInfo
from services.contracts.runs import IterationRecord, RunView, Stage
from tests.fixtures.orchestrator_stack import AUTH, Stack


@pytest.fixture
def stack(tmp_path: Path, redis_client: Redis, redis_server: RedisServer) -> Stack:
    return Stack(tmp_path, redis_server.url)


def stage_state(view: RunView, iteration: int, stage: Stage) -> str:
    for shown in view.iterations:
        if shown.iteration == iteration:
            return next(one.state for one in shown.stages if one.stage is stage)
    return "absent"


async def sampling(stack: Stack) -> None:
    """Wait until chunks are being generated."""
    await stack.eventually(lambda: stack.generator.streaming)


async def start_held(stack: Stack) -> None:
    """A run whose first iteration hangs in sampling, with the baseline decided."""
    await stack.start(iterations=0)
    await stack.status("idle")
    stack.generator.hold.clear()
    await stack.post("/v1/runs/r/iterations", json={"count": 1})
    await sampling(stack)


async def test_a_paused_run_finishes_the_chunks_that_run_and_starts_no_other(stack: Stack) -> None:
    async with stack.running():
        await start_held(stack)
        assert (await stack.post("/v1/runs/r/pause"))["status"] == "paused"
        stack.generator.hold.set()
        await stack.until(lambda view: not any(s.state == "running" and s.done == 0 for s in view.iterations[1].stages))
        sampled = [stack.store.exists(layout.rollouts_file("r", 1, chunk)) for chunk in range(3)]
        assert any(sampled)
        assert not stack.store.exists(layout.pairs_file("r", 1))
        assert (await stack.view()).status == "paused"
        assert (await stack.post("/v1/runs/r/resume"))["status"] in ("running", "queued")
        view = await stack.status("idle")
    assert view.iterations_decided == 1
    assert set(stack.generator.answered.values()) == {1}, "nothing was generated twice"


async def test_cancel_stops_a_running_chunk_within_seconds_and_resume_goes_on(stack: Stack) -> None:
    async with stack.running():
        await start_held(stack)
        async with asyncio.timeout(5):
            await stack.post("/v1/runs/r/cancel")
            await stack.eventually(lambda: not stack.generator.streaming)
        assert (await stack.view()).status == "cancelled"
        conflict = await stack.post("/v1/runs/r/iterations", json={"count": 1}, expect=409)
        assert "resume" in conflict["detail"]
        stack.generator.hold.set()
        await stack.post("/v1/runs/r/resume")
        assert (await stack.status("idle")).iterations_decided == 1


async def test_a_second_run_waits_for_the_first_and_never_mixes_with_it(stack: Stack) -> None:
    async with stack.running():
        await start_held(stack)
        await stack.start("second", iterations=1)
        assert (await stack.view("second")).status == "queued"
        await asyncio.sleep(0.6)  # a sweep passes
        assert (await stack.view("second")).iterations[0].stages[0].state == "waiting"
        stack.generator.hold.set()
        await stack.status("idle", "r")
        assert (await stack.status("idle", "second")).iterations_decided == 1


async def test_a_failed_training_fails_the_run_with_its_cause_and_resume_continues(stack: Stack) -> None:
    stack.trainer.fail = 1
    async with stack.running():
        await stack.start(iterations=1)
        view = await stack.status("failed")
        assert view.problem is not None
        assert view.problem.detail == "job r/iter-1/train: the loss is NaN at step 3"
        assert stage_state(view, 1, Stage.TRAIN) == "failed"
        before = dict(stack.generator.answered)
        await stack.post("/v1/runs/r/resume")
        view = await stack.status("idle")
    assert view.iterations_decided == 1
    assert view.problem is None
    assert {key: stack.generator.answered[key] for key in before} == before, "no chunk was generated again"


async def test_a_refused_candidate_fails_the_run_with_the_generator_s_words(stack: Stack) -> None:
    stack.generator.refused = {"runs/r/iter-1/checkpoint"}
    async with stack.running():
        await stack.start(iterations=1)
        view = await stack.status("failed")
    assert view.problem is not None
    assert view.problem.code == "checkpoint-refused"
    assert stage_state(view, 1, Stage.LOAD) == "failed"


async def test_a_run_that_fails_during_a_trial_gives_the_incumbent_back_and_can_go_on(stack: Stack) -> None:
    stack.generator.fail_trials = 2
    async with stack.running():
        await stack.start(iterations=1)
        view = await stack.status("failed")
        assert view.problem is not None
        assert "the engine died on the candidate" in view.problem.detail
        await stack.eventually(lambda: not stack.generator.info.trial)
        assert stack.generator.info.version == view.incumbent == "models/sft"
        stack.generator.fail_trials = 0
        await stack.post("/v1/runs/r/resume")
        view = await stack.status("idle")
    assert view.incumbent == "r/iter-1"


async def test_rollback_sets_the_incumbent_back_and_serves_it(stack: Stack) -> None:
    async with stack.running():
        await stack.start(iterations=2)
        assert (await stack.status("idle")).incumbent == "r/iter-2"
        refused = await stack.post("/v1/runs/r/rollback", json={"to_iteration": 9, "reason": "x"}, expect=422)
        assert refused["field"] == "to_iteration"
        await stack.post("/v1/runs/r/rollback", json={"to_iteration": 1, "reason": "answers became curt"})
        await stack.until(lambda view: view.status == "idle" and stack.generator.info.version == "r/iter-1")
        assert (await stack.view()).incumbent == "r/iter-1"
        await stack.post("/v1/runs/r/iterations", json={"count": 1})
        await stack.until(lambda view: view.iterations_decided == 3)
    record = stack.store.read_model(layout.iteration_file("r", 3), IterationRecord)
    assert record.incumbent == "r/iter-1"
    assert stack.trainer.jobs[-1].start == "runs/r/iter-1/checkpoint"


async def test_a_rollback_during_an_iteration_takes_effect_after_it(stack: Stack) -> None:
    async with stack.running():
        await start_held(stack)
        await stack.post("/v1/runs/r/rollback", json={"to_iteration": 0, "reason": "try again"})
        stack.generator.hold.set()
        view = await stack.until(lambda view: view.status == "idle" and view.iterations_decided == 1)
        assert view.iterations[1].record is not None
        assert view.iterations[1].record.decision == "promoted"
        await stack.until(lambda view: view.incumbent == "models/sft" and stack.generator.info.version == "models/sft")


async def test_a_wiped_redis_costs_no_finished_chunk(stack: Stack, redis_client: Redis) -> None:
    async with stack.running(trainer=False):
        await stack.start(iterations=1)
        await stack.until(lambda view: stage_state(view, 1, Stage.PAIR) == "succeeded")
    await redis_client.flushall()
    async with stack.running():
        assert (await stack.status("idle")).iterations_decided == 1
    assert set(stack.generator.answered.values()) == {1}
    assert set(stack.reward.scored.values()) <= {1, 2}, "held-out prompts are scored for two policies"


async def test_redis_wiped_under_a_running_orchestrator_is_only_a_delay(
    stack: Stack, redis_client: Redis
) -> None:  # fmt: skip
    async with stack.running():
        await start_held(stack)
        await redis_client.flushall()
        stack.generator.hold.set()
        assert (await stack.status("idle")).iterations_decided == 1


async def test_a_restarted_orchestrator_goes_on_where_the_last_one_stopped(stack: Stack) -> None:
    async with stack.running():
        await start_held(stack)
    stack.generator.hold.set()
    async with stack.running():
        assert (await stack.status("idle")).iterations_decided == 1


async def test_services_that_are_away_for_a_while_are_waited_for(stack: Stack) -> None:
    stack.generator.unavailable = 15
    stack.reward.unavailable = 15
    async with stack.running():
        await stack.start(iterations=1)
        assert (await stack.status("idle")).iterations_decided == 1


async def test_a_generator_that_stays_away_fails_the_run_and_is_named(stack: Stack) -> None:
    stack.generator.unavailable = 10**6
    stack.settings = stack.settings.model_copy(update={"wait_seconds": 0.1})
    async with stack.running():
        await stack.start(iterations=1)
        view = await stack.status("failed")
        assert view.problem is not None
        assert "the engine is starting" in view.problem.detail
        stack.generator.unavailable = 0
        await stack.post("/v1/runs/r/resume")
        await stack.status("idle")


@pytest.mark.parametrize("fault", ["nan", "missing"])
async def test_a_score_that_is_no_number_fails_the_run_and_is_never_defaulted(stack: Stack, fault: str) -> None:
    stack.reward.fault = fault
    async with stack.running():
        await stack.start(iterations=0)
        view = await stack.status("failed")
    assert view.problem is not None
    assert "score" in view.problem.detail
    assert not stack.store.exists(layout.iteration_file("r", 0))


async def test_a_broken_stream_and_a_stale_answer_lose_and_mix_nothing(stack: Stack) -> None:
    stack.generator.cut_after = 1
    stack.generator.stale = "someone/iter-9"
    async with stack.running():
        await stack.start(iterations=1)
        assert (await stack.status("idle")).iterations_decided == 1


async def test_without_redis_requests_are_answered_503_and_a_pause_survives(
    stack: Stack, redis_server: RedisServer
) -> None:  # fmt: skip
    async with stack.running():
        await start_held(stack)
        redis_server.stop()
        try:
            ready = await stack.http.get("/health/ready")
            assert ready.status_code == 503
            assert "Redis at 127.0.0.1" in ready.json()["detail"]
            answer = await stack.http.post("/v1/runs/r/pause", headers=AUTH)
            assert answer.status_code == 503
            assert answer.headers["content-type"] == "application/problem+json"
            assert "Redis at 127.0.0.1" in answer.json()["detail"]
        finally:
            redis_server.start()
        stack.generator.hold.set()
        await stack.status("paused")
        await stack.post("/v1/runs/r/resume")
        await stack.status("idle")


async def test_iterations_asked_for_without_redis_are_not_asked_for_so_that_a_retry_counts_once(
    stack: Stack, redis_server: RedisServer
) -> None:  # fmt: skip
    async with stack.running():
        await stack.start(iterations=0)
        await stack.status("idle")
        redis_server.stop()
        try:
            for _ in range(2):
                answer = await stack.http.post("/v1/runs/r/iterations", headers=AUTH, json={"count": 1})
                assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
                assert "nothing was changed" in answer.json()["detail"]
        finally:
            redis_server.start()
        await stack.until(lambda _: True)
        assert (await stack.post("/v1/runs/r/iterations", json={"count": 1}))["iterations_asked"] == 1


async def test_iterations_written_as_redis_goes_are_answered_by_an_error_that_no_client_repeats(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stack.running():
        await stack.start(iterations=0)
        await stack.status("idle")

        async def gone(topic: str) -> None:
            raise RedisConnectionError("gone")

        with monkeypatch.context() as patch:
            patch.setattr(stack.app.state.runs.queue, "nudge", gone)
            answer = await stack.http.post("/v1/runs/r/iterations", headers=AUTH, json={"count": 1})
        assert (answer.status_code, answer.json()["code"]) == (503, "connection-lost")
        assert "is written and takes effect" in answer.json()["detail"]
        view = await stack.until(lambda view: view.iterations_decided == 1)
        assert view.iterations_asked == 1


async def test_a_run_that_cannot_be_read_does_not_stop_the_others(stack: Stack) -> None:
    async with stack.running():
        await stack.start("broken", iterations=0)
        await stack.status("idle", "broken")
    (Path(stack.store.url) / layout.control_file("broken")).write_text("{}")
    async with stack.running():
        answer = await stack.http.get("/v1/runs/broken")
        assert (answer.status_code, answer.json()["code"]) == (500, "store")
        await stack.start("r", iterations=1)
        assert (await stack.status("idle")).iterations_decided == 1


async def test_a_change_is_not_kept_waiting_by_a_conductor_that_waits(stack: Stack) -> None:
    stack.settings = stack.settings.model_copy(update={"control_seconds": 0.2})
    async with stack.running():
        await stack.start(iterations=0)
        await stack.status("idle")
        async with stack.app.state.conductor.lock:
            answer = await stack.http.post("/v1/runs/r/pause", headers=AUTH)
        assert answer.status_code == 503
        assert "nothing was changed" in answer.json()["detail"]
        assert (await stack.post("/v1/runs/r/pause"))["status"] == "paused"


async def test_a_generator_restarted_while_no_run_works_serves_the_last_decided_policy_again(stack: Stack) -> None:
    async with stack.running():
        await stack.start("first", iterations=1)
        await stack.status("idle", "first")
        await stack.start("r", iterations=1)
        view = await stack.status("idle")
        stack.generator.info = PolicyInfo(state="empty")
        await stack.eventually(lambda: stack.generator.info.state == "serving")
        assert stack.generator.info.version == view.incumbent == "r/iter-1"
        assert not stack.generator.info.trial


@pytest.mark.parametrize(("failures", "status"), [(2, "idle"), (10, "failed")])
async def test_a_swap_that_fails_is_tried_as_often_as_a_job_is(stack: Stack, failures: int, status: str) -> None:
    stack.generator.fail_swaps = failures
    async with stack.running():
        await stack.start(iterations=1)
        view = await stack.status(status)
    if status == "failed":
        assert view.problem is not None
        assert view.problem.code == "swap-failed"
        assert stack.generator.fail_swaps == failures - 4
