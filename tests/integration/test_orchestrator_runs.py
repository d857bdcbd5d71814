"""Whole runs through the orchestrator's API: real Redis, fake generator, reward and trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis.asyncio import Redis

from ratchet.local.redis_server import RedisServer
from services.contracts import layout
from services.contracts.conversations import Prompt
from services.contracts.pairs import Pair
from services.contracts.problems import Problem
from services.contracts.rollouts import Rollout
from services.contracts.runs import IterationRecord
from services.platform.tables import read_rows
from tests.fixtures.orchestrator_stack import Stack


@pytest.fixture
def stack(tmp_path: Path, redis_client: Redis, redis_server: RedisServer) -> Stack:
    return Stack(tmp_path, redis_server.url)


async def test_a_run_of_two_iterations_improves_and_is_promoted_twice(stack: Stack) -> None:
    async with stack.running():
        await stack.start()
        view = await stack.status("idle")
    assert [i.record.decision for i in view.iterations if i.record] == ["baseline", "promoted", "promoted"]
    assert view.incumbent == "r/iter-2"
    assert view.iterations_decided == view.iterations_asked == 2
    assert stack.generator.info.version == "r/iter-2"
    assert not stack.generator.info.trial
    assert stack.generator.served == [
        ("models/sft", False), ("r/iter-1", True), ("r/iter-1", False), ("r/iter-2", True), ("r/iter-2", False),
    ]  # fmt: skip
    first, second = stack.trainer.jobs
    assert (first.start, second.start) == ("models/sft", "runs/r/iter-1/checkpoint")
    assert {first.reference, second.reference} == {"models/sft"}
    assert [job.pairs for job in stack.trainer.jobs] == [
        ("runs/r/iter-1/pairs.parquet",),
        ("runs/r/iter-2/pairs.parquet",),
    ]
    record = stack.store.read_model(layout.iteration_file("r", 2), IterationRecord)
    assert record.test is not None
    assert record.test.mean_difference == pytest.approx(0.3, abs=0.1)
    metrics = record.metrics.model_dump()
    missing = [name for name, value in metrics.items() if value is None]
    assert missing == []
    assert metrics["pairs"] == metrics["prompts"] == 10
    assert metrics["kl"] == pytest.approx(0.1 * metrics["response_tokens"])
    assert set(record.seconds_by_stage) == {
        "prompts", "sample", "score", "pair", "train", "load", "evaluate", "evaluate-score", "decide",
    }  # fmt: skip


async def test_every_prompt_is_sampled_and_paired_exactly_once(stack: Stack) -> None:
    async with stack.running():
        await stack.start(iterations=1)
        await stack.status("idle")
    drawn = [prompt.id for prompt in read_rows(stack.store, layout.prompts_file("r", 1), Prompt)]
    rollouts = [
        row for chunk in range(3) for row in read_rows(stack.store, layout.rollouts_file("r", 1, chunk), Rollout)
    ]
    assert [row.prompt_id for row in rollouts] == drawn
    assert [pair.prompt_id for pair in read_rows(stack.store, layout.pairs_file("r", 1), Pair)] == drawn
    assert all(stack.generator.answered["models/sft", id] == 1 for id in drawn)


async def test_a_worse_candidate_is_rejected_and_the_incumbent_serves_again(stack: Stack) -> None:
    stack.trainer.gains = [0.3, -0.4, 0.3]
    async with stack.running():
        await stack.start(iterations=3)
        view = await stack.status("idle")
    decisions = [i.record.decision for i in view.iterations if i.record]
    assert decisions == ["baseline", "promoted", "rejected", "promoted"]
    rejected = view.iterations[2].record
    assert rejected is not None
    assert rejected.serving == rejected.incumbent == "r/iter-1"
    assert any(reason.startswith("failed") for reason in rejected.reasons)
    assert ("r/iter-1", False) in stack.generator.served[stack.generator.served.index(("r/iter-2", True)) :]
    assert stack.trainer.jobs[2].start == "runs/r/iter-1/checkpoint"
    third = view.iterations[3].record
    assert third is not None
    assert third.incumbent == "r/iter-1"


async def test_a_prompt_that_cannot_be_answered_is_counted_with_its_reason(stack: Stack) -> None:
    async with stack.running():
        prompts = [Prompt.model_validate(p) for p in [{"id": "x", "messages": [{"role": "user", "content": "x"}]}]]
        assert prompts
        await stack.start(iterations=0)
        await stack.status("idle")
        pool = read_rows(stack.store, layout.pool_file("r"), Prompt)
        too_long = Problem(
            title="too long", status=422, detail="the prompt has 9000 tokens, at most 2048", code="invalid-input"
        )
        stack.generator.broken = {prompt.id: too_long for prompt in pool[:12]}
        passing = Problem(title="busy", status=503, detail="engine busy", code="unavailable")
        stack.generator.once = {prompt.id: passing for prompt in pool[12:]}
        await stack.post("/v1/runs/r/iterations", json={"count": 1})
        view = await stack.until(lambda view: view.iterations_decided == 1)
    record = view.iterations[1].record
    assert record is not None
    drawn = {prompt.id for prompt in read_rows(stack.store, layout.prompts_file("r", 1), Prompt)}
    lost = len(drawn & set(stack.generator.broken))
    assert lost > 0
    assert record.metrics.dropped == {"generation_failed": lost}
    assert record.metrics.pairs == 10 - lost
