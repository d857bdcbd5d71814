"""Workers against a real Redis: what handlers may do, and what happens to their jobs."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client import REGISTRY
from redis.asyncio import Redis

from services.contracts.errors import InvalidInput, Unavailable
from services.contracts.jobs import Job, JobRequest, JobState
from services.platform.jobs import EventStream, Handler, JobContext, JobQueue, JobSettings, Worker

FAST = JobSettings(
    lease_seconds=1.0,
    heartbeat_seconds=0.1,
    reclaim_seconds=0.1,
    block_seconds=0.1,
    event_interval_seconds=0.1,
    cancel_grace_seconds=0.3,
    stop_grace_seconds=0.3,
    retry_base_seconds=0.05,
)
JOB = "run/iter-1/score/0"


async def until(condition: Callable[[], Awaitable[bool] | bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found if isinstance(found, bool) else await found:
            return
        assert time.monotonic() < deadline, f"did not come true within {seconds} s"
        await asyncio.sleep(0.02)


@asynccontextmanager
async def working(queue: JobQueue, handler: Handler, *, slots: int = 1, name: str = "w") -> AsyncIterator[Worker]:
    worker = Worker(queue, queues={"score": slots}, handlers={"score_chunk": handler}, name=name)
    stop = asyncio.Event()
    task = asyncio.create_task(worker.run(stop))
    try:
        yield worker
    finally:
        stop.set()
        await asyncio.wait_for(task, 20)


@pytest.fixture
def queue(redis_client: Redis) -> JobQueue:
    return JobQueue(redis_client, FAST)


async def put(queue: JobQueue, job_id: str = JOB, **changes: Any) -> Job:
    values = {"id": job_id, "queue": "score", "kind": "score_chunk", "payload": {"chunk": 0}, "topic": "run", **changes}
    return await queue.enqueue(JobRequest.model_validate(values))


async def ended(queue: JobQueue, job_id: str = JOB) -> Job:
    found: list[Job] = []

    async def final() -> bool:
        job = await queue.get(job_id)
        assert job is not None
        found[:] = [job]
        return job.state.final

    await until(final)
    return found[0]


async def test_a_job_is_done_and_its_result_kept(queue: JobQueue) -> None:
    async def handler(context: JobContext) -> dict[str, Any]:
        context.progress(done=4)
        return {"chunk": context.job.payload["chunk"], "fence": context.fence}

    await put(queue)
    labels = {"queue": "score", "outcome": "succeeded"}
    before = REGISTRY.get_sample_value("ratchet_jobs_attempts_total", labels) or 0
    async with working(queue, handler):
        job = await ended(queue)
    assert (job.state, job.result, job.progress, job.attempts) == (
        JobState.SUCCEEDED, {"chunk": 0, "fence": 1}, {"done": 4}, 1,
    )  # fmt: skip
    assert REGISTRY.get_sample_value("ratchet_jobs_attempts_total", labels) == before + 1


async def test_two_workers_never_run_one_job_at_once_while_heartbeats_arrive(queue: JobQueue) -> None:
    running: dict[str, int] = {}
    starts: list[str] = []
    overlaps: list[str] = []

    async def handler(context: JobContext) -> dict[str, Any]:
        job_id = context.job.id
        starts.append(job_id)
        running[job_id] = running.get(job_id, 0) + 1
        if running[job_id] > 1:
            overlaps.append(job_id)
        await asyncio.sleep(2.5 * FAST.lease_seconds)
        running[job_id] -= 1
        return {}

    ids = [f"run/iter-1/score/{n}" for n in range(4)]
    for job_id in ids:
        await put(queue, job_id)
    async with working(queue, handler, slots=4, name="a"), working(queue, handler, slots=4, name="b"):
        for job_id in ids:
            assert (await ended(queue, job_id)).attempts == 1
    assert overlaps == []
    assert sorted(starts) == ids


async def test_no_more_jobs_run_at_once_than_the_queue_has_slots(queue: JobQueue) -> None:
    most = now = 0

    async def handler(_: JobContext) -> dict[str, Any]:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.05)
        now -= 1
        return {}

    for n in range(12):
        await put(queue, f"run/iter-1/score/{n}")
    async with working(queue, handler, slots=3):
        for n in range(12):
            await ended(queue, f"run/iter-1/score/{n}")
    assert most == 3


async def test_a_retryable_error_is_tried_again_after_the_time_it_names(queue: JobQueue) -> None:
    times: list[float] = []

    async def handler(_: JobContext) -> dict[str, Any]:
        times.append(time.monotonic())
        if len(times) == 1:
            raise Unavailable("the scorer starts", retry_after_seconds=0.7)
        return {}

    await put(queue)
    async with working(queue, handler):
        job = await ended(queue)
    assert (job.state, job.attempts, job.problem) == (JobState.SUCCEEDED, 2, None)
    assert times[1] - times[0] >= 0.65


async def test_an_error_that_a_retry_does_not_mend_fails_the_job_at_once(queue: JobQueue) -> None:
    async def handler(_: JobContext) -> dict[str, Any]:
        raise InvalidInput("chunk: 0 is not a chunk", field="chunk")

    await put(queue)
    async with working(queue, handler):
        job = await ended(queue)
    assert job.problem is not None
    assert (job.state, job.attempts, job.problem.code, job.problem.field) == (
        JobState.FAILED, 1, "invalid-input", "chunk",
    )  # fmt: skip


@pytest.mark.parametrize("answer", [ZeroDivisionError("by zero"), asyncio.CancelledError(), {"not": object()}])
async def test_an_unexpected_error_is_tried_up_to_the_limit_and_then_named(queue: JobQueue, answer: Any) -> None:
    async def handler(_: JobContext) -> dict[str, Any]:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    await put(queue, max_attempts=2)
    async with working(queue, handler):
        job = await ended(queue)
    name = type(answer).__name__ if isinstance(answer, BaseException) else "TypeError"
    assert job.problem is not None
    assert (job.state, job.attempts) == (JobState.FAILED, 2)
    assert name in job.problem.detail


async def test_a_kind_without_a_handler_fails_with_its_name(queue: JobQueue) -> None:
    async def handler(_: JobContext) -> dict[str, Any]:
        return {}

    await put(queue, kind="unheard_of")
    async with working(queue, handler):
        job = await ended(queue)
    assert job.problem is not None
    assert "unheard_of" in job.problem.detail


@pytest.mark.parametrize("cleans_up", [True, False])
async def test_a_running_job_is_cancelled_within_its_grace(queue: JobQueue, cleans_up: bool) -> None:
    started = asyncio.Event()
    ends: list[str] = []

    async def handler(context: JobContext) -> dict[str, Any]:
        started.set()
        try:
            if cleans_up:
                await context.cancelled.wait()
                ends.append("cleaned up")
                return {}
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ends.append("task cancelled")
            raise
        return {}

    await put(queue)
    async with working(queue, handler):
        await started.wait()
        await queue.cancel(JOB)
        job = await ended(queue)
    assert (job.state, job.result) == (JobState.CANCELLED, None)
    assert ends == ["cleaned up" if cleans_up else "task cancelled"]


async def test_a_stopping_worker_gives_its_job_back_and_another_does_it(queue: JobQueue) -> None:
    started = asyncio.Event()

    async def stuck(_: JobContext) -> dict[str, Any]:
        started.set()
        await asyncio.Event().wait()
        return {}

    async def quick(_: JobContext) -> dict[str, Any]:
        return {"by": "second"}

    await put(queue, max_attempts=1)
    async with working(queue, stuck, name="first"):
        await started.wait()
    job = await queue.get(JOB)
    assert job is not None
    assert (job.state, job.attempts, job.worker) == (JobState.QUEUED, 0, None)
    async with working(queue, quick, name="second"):
        assert (await ended(queue)).result == {"by": "second"}


async def test_a_stopping_worker_lets_a_job_end_that_is_nearly_done(queue: JobQueue) -> None:
    started = asyncio.Event()
    go_on = asyncio.Event()

    async def handler(_: JobContext) -> dict[str, Any]:
        started.set()
        await go_on.wait()
        return {"done": True}

    await put(queue)
    async with working(queue, handler):
        await started.wait()
        asyncio.get_running_loop().call_later(0.1, go_on.set)
    assert (await ended(queue)).result == {"done": True}


async def test_a_job_without_progress_is_stopped_and_tried_again(redis_client: Redis) -> None:
    queue = JobQueue(redis_client, FAST.model_copy(update={"stall_seconds": 0.3}))
    attempts: list[int] = []

    async def handler(context: JobContext) -> dict[str, Any]:
        attempts.append(context.job.attempts)
        if context.job.attempts == 1:
            await asyncio.Event().wait()
        for done in range(4):
            await asyncio.sleep(0.15)
            context.progress(done=done)
        return {}

    await put(queue)
    async with working(queue, handler):
        job = await ended(queue)
    assert (job.state, attempts) == (JobState.SUCCEEDED, [1, 2])


async def test_progress_reaches_the_event_stream_while_the_job_runs(queue: JobQueue) -> None:
    seen = asyncio.Event()

    async def handler(context: JobContext) -> dict[str, Any]:
        context.progress(done=1, of=2)
        await seen.wait()
        return {}

    await put(queue)
    async with working(queue, handler):

        async def told() -> bool:
            events = await EventStream(queue.redis).read("run")
            return any(event.type == "job.progress" and event.data == {"done": 1, "of": 2} for event in events)

        await until(told)
        seen.set()
        await ended(queue)


async def test_a_job_that_cannot_be_read_does_not_stop_the_others(queue: JobQueue) -> None:
    async def handler(_: JobContext) -> dict[str, Any]:
        return {}

    await put(queue)
    await queue.redis.hset(queue.keys.job(JOB), "payload", "no json")
    await put(queue, "run/iter-1/score/1")
    async with working(queue, handler):
        assert (await ended(queue, "run/iter-1/score/1")).state is JobState.SUCCEEDED


async def test_a_wiped_redis_costs_the_job_but_not_the_worker(queue: JobQueue) -> None:
    ends: list[str] = []
    started = asyncio.Event()

    async def handler(context: JobContext) -> dict[str, Any]:
        started.set()
        if context.job.payload == {"chunk": 0}:
            try:
                await asyncio.Event().wait()
            finally:
                ends.append("lost" if context.lost.is_set() else "other")
        return {}

    await put(queue)
    async with working(queue, handler, slots=2):
        await started.wait()
        await queue.redis.flushall()
        await until(lambda: ends == ["lost"])
        await put(queue, "run/iter-1/score/1", payload={"chunk": 1})
        assert (await ended(queue, "run/iter-1/score/1")).state is JobState.SUCCEEDED
