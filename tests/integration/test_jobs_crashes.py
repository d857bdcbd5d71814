"""Crashes, with real processes: a worker killed or paused, Redis killed. Nothing is lost, nothing done twice."""

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from ratchet.local.redis_server import RedisServer
from services.contracts.errors import Unavailable
from services.contracts.jobs import Job, JobRequest, JobState
from services.platform.jobs import Beat, JobContext, JobQueue, JobSettings, Worker, connect

FAST = JobSettings(
    lease_seconds=1.0, heartbeat_seconds=0.2, reclaim_seconds=0.2, event_interval_seconds=0.2, block_seconds=0.2
)
JOB = "run/iter-1/score/0"
ROOT = Path(__file__).parents[2]

# A worker process whose handler says that it started, and ends when the key `go` is there.
CHILD = """
import asyncio, sys
from services.platform.jobs import JobQueue, JobSettings, Worker, connect

async def main(url, settings, name):
    queue = JobQueue(await connect(url), JobSettings.model_validate_json(settings))
    redis = await connect(url)

    async def handler(context):
        await redis.rpush("starts", name)
        while not await redis.exists("go"):
            await asyncio.sleep(0.02)
        return {"by": name, "fence": context.fence}

    worker = Worker(queue, queues={"score": 1}, handlers={"score_chunk": handler}, name=name)
    await worker.run(asyncio.Event())

asyncio.run(main(*sys.argv[1:]))
"""

StartWorker = Callable[[str], subprocess.Popen[bytes]]


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, f"did not come true within {seconds} s"
        await asyncio.sleep(0.02)


@pytest.fixture
def queue(redis_client: Redis) -> JobQueue:
    return JobQueue(redis_client, FAST)


@pytest.fixture
def start_worker(redis_server: RedisServer) -> Iterator[StartWorker]:
    children: list[subprocess.Popen[bytes]] = []

    def start(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", CHILD, redis_server.url, FAST.model_dump_json(), name]
        children.append(subprocess.Popen(command, cwd=ROOT))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.wait(10)


async def put(queue: JobQueue, job_id: str = JOB, max_attempts: int = 4) -> None:
    await queue.enqueue(
        JobRequest(id=job_id, queue="score", kind="score_chunk", payload={}, topic="run", max_attempts=max_attempts)
    )


async def job_of(queue: JobQueue, job_id: str = JOB) -> Job:
    job = await queue.get(job_id)
    assert job is not None
    return job


def started(queue: JobQueue, *names: str) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        return await queue.redis.lrange("starts", 0, -1) == list(names)

    return check


def in_state(queue: JobQueue, state: JobState) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        return (await job_of(queue)).state is state

    return check


async def test_a_killed_worker_s_job_is_finished_by_another(queue: JobQueue, start_worker: StartWorker) -> None:
    await put(queue)
    first = start_worker("first")
    await until(started(queue, "first"))
    first.kill()
    first.wait(10)
    await queue.redis.set("go", 1)
    start_worker("second")
    await until(in_state(queue, JobState.SUCCEEDED))
    job = await job_of(queue)
    assert job.result is not None
    assert (job.result["by"], job.attempts) == ("second", 2)
    assert await started(queue, "first", "second")()


async def test_a_paused_worker_s_late_result_is_refused(queue: JobQueue, start_worker: StartWorker) -> None:
    await put(queue)
    first = start_worker("first")
    await until(started(queue, "first"))
    first.send_signal(signal.SIGSTOP)
    second = start_worker("second")
    await until(started(queue, "first", "second"))
    await queue.redis.set("go", 1)
    await until(in_state(queue, JobState.SUCCEEDED))
    second.kill()
    second.wait(10)
    # The first wakes up with its handler about to end; it can do the next job only after it dealt with this one.
    first.send_signal(signal.SIGCONT)
    await put(queue, "run/iter-1/score/1")

    async def first_went_on() -> bool:
        return (await job_of(queue, "run/iter-1/score/1")).result == {"by": "first", "fence": 1}

    await until(first_went_on)
    job = await job_of(queue)
    assert job.result == {"by": "second", "fence": job.fence}
    messages = await queue.redis.xrange(queue.keys.inbox)
    assert [record["state"] for _, record in messages if record["job_id"] == JOB] == ["succeeded"]


async def test_a_job_that_kills_each_of_its_workers_fails_and_the_inbox_is_told(
    queue: JobQueue, start_worker: StartWorker
) -> None:
    await put(queue, max_attempts=2)
    for names in (["a"], ["a", "b"]):
        child = start_worker(names[-1])
        await until(started(queue, *names))
        child.kill()
        child.wait(10)
    start_worker("c")
    await until(in_state(queue, JobState.FAILED))
    job = await job_of(queue)
    assert job.problem is not None
    assert job.problem.code == "worker-lost"
    assert await started(queue, "a", "b")()
    messages = await queue.redis.xrange(queue.keys.inbox)
    assert [(record["job_id"], record["state"]) for _, record in messages] == [(JOB, "failed")]


@pytest.mark.parametrize("ends_while_redis_is_away", [False, True])
async def test_redis_killed_for_a_second_mid_job_leaves_the_job_done_exactly_once(
    tmp_path: Path, ends_while_redis_is_away: bool
) -> None:
    starts: list[str] = []
    running, go_on, stop = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def handler(context: JobContext) -> dict[str, Any]:
        starts.append(context.job.id)
        running.set()
        await go_on.wait()
        return {"fence": context.fence}

    with RedisServer(tmp_path) as server:
        queues = [JobQueue(await connect(server.url), FAST) for _ in range(2)]
        workers = [
            Worker(queue, queues={"score": 1}, handlers={"score_chunk": handler}, name=f"w{n}")
            for n, queue in enumerate(queues)
        ]
        tasks = [asyncio.create_task(worker.run(stop)) for worker in workers]
        await put(queues[0])
        await asyncio.wait_for(running.wait(), 10)
        server.kill()
        if ends_while_redis_is_away:
            go_on.set()
        # One second down: longer than the lease's heartbeats, and the lease runs out meanwhile.
        await asyncio.sleep(1.0)
        assert all(worker.redis_error for worker in workers)
        assert all(worker.seconds_since_progress < 5 for worker in workers)
        server.start()
        if not ends_while_redis_is_away:
            # Longer than a lease, so that a wrong reclaim would have had its time.
            await asyncio.sleep(2.5 * FAST.lease_seconds)
            go_on.set()
        await until(in_state(queues[0], JobState.SUCCEEDED))
        # Work goes on afterwards.
        await put(queues[0], "run/iter-1/score/1")

        async def next_done() -> bool:
            return (await job_of(queues[0], "run/iter-1/score/1")).state is JobState.SUCCEEDED

        await until(next_done)
        job = await job_of(queues[0])
        assert (starts.count(JOB), job.attempts, job.result) == (1, 1, {"fence": 1})
        assert all(worker.redis_error is None for worker in workers)
        stop.set()
        await asyncio.wait_for(asyncio.gather(*tasks), 20)
        for queue in queues:
            await queue.redis.aclose()


async def test_after_a_restart_of_redis_owners_have_one_lease_to_renew(tmp_path: Path) -> None:
    # Long enough that the restart itself fits in it well on a busy machine.
    settings = FAST.model_copy(update={"lease_seconds": 5.0})
    with RedisServer(tmp_path) as server:
        queue = JobQueue(await connect(server.url), settings)
        await put(queue)
        claim = await queue.claim("score", "w", 0)
        assert claim is not None
        claimed_at = time.monotonic()
        server.kill()
        await asyncio.sleep(settings.lease_seconds + 0.2 - (time.monotonic() - claimed_at))
        server.start()
        # The lease ran out while the server was down; whoever looks first must leave it.
        assert await queue.reclaim("score", "other") == 0
        assert await queue.heartbeat(claim) is Beat.OK
        await queue.redis.aclose()


async def test_acknowledged_jobs_survive_kill_9_of_redis(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        queue = JobQueue(await connect(server.url), FAST)
        ids = [f"run/iter-1/score/{n}" for n in range(40)]
        for job_id in ids:
            await put(queue, job_id)
        server.kill()
        server.start()
        assert list(await queue.get_many(ids)) == ids
        claimed = [await queue.claim("score", "w", 0) for _ in ids]
        assert [claim.job.id for claim in claimed if claim] == ids
        await queue.redis.aclose()


def test_a_server_that_cannot_start_says_why(redis_server: RedisServer, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=rf"on port {redis_server.port} ended with code"):
        RedisServer(tmp_path, port=redis_server.port).start()


def test_a_server_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ratchet.local.redis_server import RedisServer\n"
        "server = RedisServer(Path(sys.argv[1])); server.start(); print(server.port, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        port = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 10
    while _listens(port):
        assert time.monotonic() < deadline, "the server outlived its parent by 10 s"
        time.sleep(0.02)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
