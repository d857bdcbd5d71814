"""The job queue against a real Redis: each transition, and who may make it."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
from redis.asyncio import Redis

from services.contracts.errors import Conflict, Fenced, NotFound, Unavailable
from services.contracts.jobs import JobRequest, JobState
from services.platform.jobs import Beat, EventStream, JobQueue, JobSettings

FAST = JobSettings(lease_seconds=1.0, heartbeat_seconds=0.2, reclaim_seconds=0.2, event_interval_seconds=0.2)
PROBLEM = Unavailable("the scorer is down").problem()


def request(job_id: str = "run/iter-1/score/0", **changes: object) -> JobRequest:
    values = {"id": job_id, "queue": "score", "kind": "score_chunk", "payload": {"chunk": 0}, "topic": "run", **changes}
    return JobRequest.model_validate(values)


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, f"did not come true within {seconds} s"
        await asyncio.sleep(0.02)


@pytest.fixture
def queue(redis_client: Redis) -> JobQueue:
    return JobQueue(redis_client, FAST)


async def types(queue: JobQueue, topic: str = "run") -> list[str]:
    return [event.type for event in await EventStream(queue.redis).read(topic)]


async def test_enqueueing_twice_is_one_job(queue: JobQueue) -> None:
    first = await queue.enqueue(request(payload={"a": 1, "b": 2}))
    again = await queue.enqueue(request(payload={"b": 2, "a": 1}))
    assert first == again
    assert await queue.claim("score", "w", 0) is not None
    assert await queue.claim("score", "w", 0) is None
    assert await types(queue) == ["job.queued", "job.started"]


async def test_enqueueing_an_ended_job_again_does_not_run_it_again(queue: JobQueue) -> None:
    await queue.enqueue(request())
    claim = await queue.claim("score", "w", 0)
    assert claim is not None
    await queue.finish(claim, {"reward": 1.5})
    again = await queue.enqueue(request())
    assert (again.state, again.result) == (JobState.SUCCEEDED, {"reward": 1.5})
    assert await queue.claim("score", "w", 0) is None


async def test_the_same_id_with_another_payload_is_a_conflict(queue: JobQueue) -> None:
    await queue.enqueue(request())
    with pytest.raises(Conflict, match="another queue, kind or payload") as raised:
        await queue.enqueue(request(payload={"chunk": 1}))
    assert raised.value.status == 409


async def test_a_job_enqueued_before_the_first_worker_is_found_by_it(queue: JobQueue) -> None:
    await queue.enqueue(request())
    claim = await queue.claim("score", "w", 0)
    assert claim is not None
    assert (claim.fence, claim.job.state, claim.job.worker, claim.job.attempts) == (1, JobState.RUNNING, "w", 1)


async def test_an_end_is_told_to_the_inbox_and_leaves_nothing_in_the_queue(queue: JobQueue) -> None:
    await queue.enqueue(request())
    claim = await queue.claim("score", "w", 0)
    assert claim is not None
    await queue.finish(claim, {})
    # The first read makes the group.
    messages = [*await queue.read_inbox("o", 0), *await queue.read_inbox("o", 0)]
    assert [(m.job_id, m.topic, m.state) for _, m in messages] == [(claim.job.id, "run", JobState.SUCCEEDED)]
    assert await queue.redis.xlen(queue.keys.queue("score")) == 0
    await queue.ack_inbox([entry for entry, _ in messages])
    assert await queue.redis.xlen(queue.keys.inbox) == 0


async def test_an_unacknowledged_message_comes_again(queue: JobQueue) -> None:
    await queue.nudge("run")
    await queue.read_inbox("o", 0)
    assert [m.topic for _, m in await queue.read_inbox("o", 0)] == ["run"]

    async def again() -> bool:
        return bool(await queue.read_inbox("other", 0))

    await until(again)


async def test_a_finish_sent_twice_is_one_finish(queue: JobQueue) -> None:
    await queue.enqueue(request())
    claim = await queue.claim("score", "w", 0)
    assert claim is not None
    await queue.finish(claim, {"n": 1})
    await queue.finish(claim, {"n": 1})
    assert (await types(queue)).count("job.succeeded") == 1
    assert await queue.redis.xlen(queue.keys.inbox) == 1


async def test_a_fail_sent_twice_uses_one_attempt(queue: JobQueue) -> None:
    await queue.enqueue(request())
    claim = await queue.claim("score", "w", 0)
    assert claim is not None
    first = await queue.fail(claim, PROBLEM, retry=True)
    assert await queue.fail(claim, PROBLEM, retry=True) == first
    assert (first.state, first.attempts) == (JobState.QUEUED, 1)
    assert await queue.claim("score", "w", 0) is not None
    assert await queue.claim("score", "w", 0) is None


async def test_a_stale_claim_can_change_nothing(queue: JobQueue) -> None:
    await queue.enqueue(request())
    old = await queue.claim("score", "slow", 0)
    assert old is not None

    async def taken_back() -> bool:
        return await queue.reclaim("score", "other") == 1

    await until(taken_back)
    # Refused even before another worker has it.
    for early in (queue.finish(old, {"from": "slow"}), queue.fail(old, PROBLEM, retry=True), queue.release(old)):
        with pytest.raises(Fenced):
            await early
    new = await queue.claim("score", "other", 0)
    assert new is not None
    assert new.fence > old.fence
    assert await queue.heartbeat(old) is Beat.LOST
    for late in (
        queue.finish(old, {"from": "slow"}),
        queue.fail(old, PROBLEM, retry=True),
        queue.finish_cancelled(old),
        queue.release(old),
    ):
        with pytest.raises(Fenced):
            await late
    await queue.finish(new, {"from": "other"})
    job = await queue.get(old.job.id)
    assert job is not None
    assert job.result == {"from": "other"}


async def test_a_renewed_lease_is_not_taken(queue: JobQueue) -> None:
    await queue.enqueue(request())
    claim = await queue.claim("score", "w", 0)
    assert claim is not None
    ends = time.monotonic() + 2.5 * FAST.lease_seconds
    while time.monotonic() < ends:
        assert await queue.heartbeat(claim) is Beat.OK
        assert await queue.reclaim("score", "other") == 0
        await asyncio.sleep(0.1)


async def test_attempts_are_bounded_and_the_inbox_is_told_when_workers_die(queue: JobQueue) -> None:
    await queue.enqueue(request(max_attempts=2))
    for _ in range(2):
        assert await queue.claim("score", "dies", 1) is not None

        async def taken_back() -> bool:
            return await queue.reclaim("score", "other") == 1

        await until(taken_back)
    job = await queue.get("run/iter-1/score/0")
    assert job is not None
    assert job.problem is not None
    assert (job.state, job.attempts, job.problem.code) == (JobState.FAILED, 2, "worker-lost")
    assert "dies" in job.problem.detail
    assert "all 2 attempts" in job.problem.detail
    await queue.read_inbox("o", 0)
    assert [m.state for _, m in await queue.read_inbox("o", 0)] == [JobState.FAILED]


async def test_a_waiting_job_is_cancelled_at_once_and_the_inbox_is_told(queue: JobQueue) -> None:
    await queue.enqueue(request())
    assert (await queue.cancel("run/iter-1/score/0")).state is JobState.CANCELLED
    assert await queue.claim("score", "w", 0) is None
    await queue.read_inbox("o", 0)
    assert [m.state for _, m in await queue.read_inbox("o", 0)] == [JobState.CANCELLED]


async def test_a_running_job_sees_its_cancel_at_the_next_heartbeat(queue: JobQueue) -> None:
    await queue.enqueue(request())
    claim = await queue.claim("score", "w", 0)
    assert claim is not None
    assert (await queue.cancel(claim.job.id)).state is JobState.RUNNING
    assert await queue.heartbeat(claim) is Beat.CANCEL
    await queue.finish_cancelled(claim)
    job = await queue.get(claim.job.id)
    assert job is not None
    assert job.state is JobState.CANCELLED


async def test_a_cancelled_job_whose_worker_died_is_not_run_again(queue: JobQueue) -> None:
    await queue.enqueue(request())
    claim = await queue.claim("score", "dies", 0)
    assert claim is not None
    await queue.cancel(claim.job.id)

    async def cancelled() -> bool:
        await queue.reclaim("score", "other")
        job = await queue.get(claim.job.id)
        return job is not None and job.state is JobState.CANCELLED

    await until(cancelled)
    assert await queue.claim("score", "other", 0) is None


async def test_an_unknown_job_cannot_be_cancelled_or_retried(queue: JobQueue) -> None:
    with pytest.raises(NotFound):
        await queue.cancel("none")
    with pytest.raises(NotFound):
        await queue.retry("none")
    assert await queue.get("none") is None


async def test_a_failed_job_can_be_retried_with_all_its_attempts(queue: JobQueue) -> None:
    await queue.enqueue(request(max_attempts=1))
    claim = await queue.claim("score", "w", 0)
    assert claim is not None
    assert (await queue.fail(claim, PROBLEM, retry=True)).state is JobState.FAILED
    job = await queue.retry(claim.job.id)
    assert (job.state, job.attempts, job.problem, job.fence) == (JobState.QUEUED, 0, None, claim.fence)
    again = await queue.claim("score", "w", 0)
    assert again is not None
    assert again.fence > claim.fence
    assert (await queue.retry(claim.job.id)).state is JobState.RUNNING


async def test_a_delayed_retry_waits_and_then_runs(queue: JobQueue) -> None:
    await queue.enqueue(request())
    claim = await queue.claim("score", "w", 0)
    assert claim is not None
    failed_at = time.monotonic()
    await queue.fail(claim, PROBLEM, retry=True, delay_seconds=0.6)
    assert await queue.claim("score", "w", 0) is None
    again = await queue.claim("score", "w", 10)
    assert again is not None
    assert 0.55 <= time.monotonic() - failed_at < 5
    assert again.job.attempts == 2


async def test_a_job_that_waits_for_its_retry_can_be_cancelled(queue: JobQueue) -> None:
    await queue.enqueue(request())
    claim = await queue.claim("score", "w", 0)
    assert claim is not None
    await queue.fail(claim, PROBLEM, retry=True, delay_seconds=0.2)
    assert (await queue.cancel(claim.job.id)).state is JobState.CANCELLED
    assert await queue.claim("score", "w", 0.5) is None


async def test_a_released_job_is_taken_at_once_and_the_attempt_does_not_count(queue: JobQueue) -> None:
    await queue.enqueue(request())
    claim = await queue.claim("score", "w", 0)
    assert claim is not None
    await queue.release(claim)
    again = await queue.claim("score", "other", 0)
    assert again is not None
    assert (again.job.attempts, again.fence) == (1, 2)


async def test_many_jobs_are_read_at_once_and_missing_ones_left_out(queue: JobQueue) -> None:
    ids = [f"run/iter-1/score/{n}" for n in range(5)]
    for job_id in ids:
        await queue.enqueue(request(job_id))
    assert list(await queue.get_many([*ids, "none"])) == ids
    assert [job.id for job in await queue.list("score", limit=2)] == ids[:2:-1]


async def test_progress_events_of_one_job_keep_their_distance(queue: JobQueue) -> None:
    await queue.enqueue(request())
    claim = await queue.claim("score", "w", 0)
    assert claim is not None
    started = time.monotonic()
    for done in range(60):
        await queue.heartbeat(claim, {"done": done})
    seconds = time.monotonic() - started
    shown = (await types(queue)).count("job.progress")
    assert 1 <= shown <= 1 + seconds / FAST.event_interval_seconds
    job = await queue.get(claim.job.id)
    assert job is not None
    assert job.progress == {"done": 59}

    async def told() -> bool:
        await queue.heartbeat(claim)
        events = await EventStream(queue.redis).read("run")
        return events[-1].data == {"done": 59}

    await until(told)
