"""What is told of the queues: how much waits and for how long, what was retried, what is dead."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import REGISTRY
from redis.asyncio import Redis

from services.contracts.errors import InvalidInput, Unavailable
from services.contracts.jobs import JobRequest
from services.platform.jobs import EventStream, JobContext, JobQueue, JobSettings, Worker
from services.platform.jobs.records import QueueDepth

FAST = JobSettings(
    lease_seconds=1.0, heartbeat_seconds=0.2, reclaim_seconds=0.2, event_interval_seconds=0.05, block_seconds=0.1,
    retry_base_seconds=0.05, stop_grace_seconds=0.2, cancel_grace_seconds=0.2,
)  # fmt: skip


@pytest.fixture
def queue(redis_client: Redis) -> JobQueue:
    return JobQueue(redis_client, FAST)


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def put(queue: JobQueue, number: int, attempts: int = 2) -> str:
    job_id = f"r/iter-1/score/{number:05d}"
    request = JobRequest(id=job_id, queue="score", kind="score", payload={}, topic="r", max_attempts=attempts)
    await queue.enqueue(request)
    return job_id


async def test_the_depth_of_a_queue_counts_what_nobody_has_taken(queue: JobQueue) -> None:
    assert await queue.depth("score") == QueueDepth(0, 0, 0.0)
    enqueued = value("ratchet_jobs_enqueued_total", queue="score", kind="score")
    for number in range(3):
        await put(queue, number)
    await put(queue, 0)  # the same job
    assert value("ratchet_jobs_enqueued_total", queue="score", kind="score") == enqueued + 3
    found = await queue.depth("score")
    assert (found.waiting, found.delayed) == (3, 0)
    oldest = found.oldest_seconds
    claim = await queue.claim("score", "w", 0.1)
    assert claim is not None
    found = await queue.depth("score")
    assert found.waiting == 2, "a claimed job does not wait"
    await queue.fail(claim, Unavailable("later").problem(), retry=True, delay_seconds=60)
    found = await queue.depth("score")
    assert (found.waiting, found.delayed) == (2, 1)
    assert found.oldest_seconds >= oldest
    for _ in range(2):
        taken = await queue.claim("score", "w", 0.1)
        assert taken is not None
        await queue.finish(taken, {})
    assert await queue.depth("score") == QueueDepth(0, 1, 0.0)


async def test_retries_and_dead_letters_are_counted_by_reason(queue: JobQueue) -> None:
    async def handler(context: JobContext) -> dict[str, Any]:
        if context.job.id.endswith("0"):
            raise InvalidInput("it never can")
        if context.job.attempts == 1:
            raise Unavailable("not now")
        return {}

    names = {
        "dead": ("ratchet_jobs_dead_lettered_total", {}),
        "error": ("ratchet_jobs_retries_total", {"reason": "error"}),
    }
    before = {key: value(name, queue="score", **labels) for key, (name, labels) in names.items()}
    worker = Worker(queue, queues={"score": 2}, handlers={"score": handler}, name="w")
    stop = asyncio.Event()
    task = asyncio.create_task(worker.run(stop))
    waiting = {await put(queue, 0), await put(queue, 1)}
    async for event in EventStream(queue.redis, FAST).follow("r"):
        if event.type in ("job.failed", "job.succeeded"):
            waiting.discard(event.job_id or "")
        if not waiting:
            break
    stop.set()
    await task
    after = {key: value(name, queue="score", **labels) for key, (name, labels) in names.items()}
    assert {key: after[key] - before[key] for key in names} == {"dead": 1, "error": 1}


async def test_a_job_of_a_dead_worker_counts_as_lost_and_then_as_dead(queue: JobQueue) -> None:
    dead = value("ratchet_jobs_dead_lettered_total", queue="score")
    lost = value("ratchet_jobs_retries_total", queue="score", reason="lost")
    await put(queue, 0, attempts=2)

    async def reclaimed() -> None:
        async with asyncio.timeout(20):
            while await queue.reclaim("score", "other") == 0:  # noqa: ASYNC110 - a lease runs out by Redis' clock
                await asyncio.sleep(0.05)

    assert await queue.claim("score", "dies", 0.1) is not None
    await reclaimed()
    assert value("ratchet_jobs_retries_total", queue="score", reason="lost") == lost + 1
    assert await queue.claim("score", "dies too", 0.5) is not None
    await reclaimed()
    assert value("ratchet_jobs_dead_lettered_total", queue="score") == dead + 1
    assert value("ratchet_jobs_retries_total", queue="score", reason="lost") == lost + 1


async def test_followers_of_events_are_counted_while_they_follow(redis_client: Redis) -> None:
    events = EventStream(redis_client, FAST)
    before = value("ratchet_events_followers")
    await events.publish("r", "run.created", {})
    following = events.follow("r")
    await anext(following)
    assert value("ratchet_events_followers") == before + 1
    await following.aclose()
    assert value("ratchet_events_followers") == before
