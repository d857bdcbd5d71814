"""The job queue: at-least-once delivery over Redis Streams; leases and fences make the effect exactly once."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from services.contracts.errors import Conflict, Fenced, NotFound
from services.contracts.jobs import Job, JobOutcome, JobRequest, JobState
from services.contracts.problems import Problem
from services.platform.jobs.records import Claim, Keys, QueueDepth, encode, fields, job_from, outcome_from
from services.platform.jobs.scripts import GROUP, SCRIPTS
from services.platform.jobs.settings import DEFAULT_SETTINGS, JobSettings
from services.platform.metrics import JOBS_DEAD, JOBS_ENQUEUED, JOBS_RETRIED

INBOX_GROUP = "orchestrator"
BATCH = 100
"""Entries handled by one call of a script: Redis serves nobody else meanwhile."""

FORGET_CONSUMER_SECONDS = 3600.0
"""A consumer without work and silent for this long is a process of the past."""


class Beat(StrEnum):
    """Answer to a heartbeat."""

    OK = "OK"
    CANCEL = "CANCEL"
    LOST = "LOST"


class JobQueue:
    """Jobs in Redis. Safe to share between tasks; holds no state of its own.

    Args:
        redis: From `connect` (answers must be decoded).
        settings: Leases and limits; the same in every process.
    """

    def __init__(self, redis: Redis, settings: JobSettings = DEFAULT_SETTINGS) -> None:
        self.redis: Any = redis
        self.settings = settings
        self.keys = Keys(settings.key_prefix)
        self._scripts: dict[str, Any] = {name: self.redis.register_script(source) for name, source in SCRIPTS.items()}

    async def _call(self, script: str, keys: Sequence[str], *args: str | int) -> Any:
        shared = (self.settings.key_prefix, self.settings.events_kept, self.settings.inbox_kept)
        return await self._scripts[script](keys=keys, args=[*shared, *args])

    async def enqueue(self, request: JobRequest) -> Job:
        """Queue a job, or find it: same id, queue, kind and payload is the same job, whatever its state.

        Raises:
            Conflict: The id is taken by other work.
        """
        status, flat = await self._call(
            "enqueue", [self.keys.job(request.id)],
            request.id, request.queue, request.kind, encode(request.payload), request.topic, request.max_attempts,
        )  # fmt: skip
        job = job_from(fields(flat))
        if status == "CONFLICT":
            raise Conflict(
                f"job {request.id!r} exists with another queue, kind or payload (kind {job.kind!r}, queue {job.queue!r}"
                f", {job.state}). An id names one piece of work: use another id, or send the same payload.",
                field="id",
            )
        if status == "NEW":
            JOBS_ENQUEUED.labels(job.queue, job.kind).inc()
        return job

    async def get(self, job_id: str) -> Job | None:
        """The job, or None."""
        record = await self.redis.hgetall(self.keys.job(job_id))
        return job_from(record) if record else None

    async def get_many(self, ids: Sequence[str]) -> dict[str, Job]:
        """Jobs by id in few round trips. Ids that do not exist are left out."""
        found: dict[str, Job] = {}
        for start in range(0, len(ids), BATCH * 5):
            part = ids[start : start + BATCH * 5]
            async with self.redis.pipeline(transaction=False) as pipeline:
                for job_id in part:
                    pipeline.hgetall(self.keys.job(job_id))
                records = await pipeline.execute()
            found.update({job_id: job_from(record) for job_id, record in zip(part, records, strict=True) if record})
        return found

    async def list(self, queue: str, limit: int = 100) -> list[Job]:
        """A queue's jobs in every state, newest first."""
        ids: list[str] = await self.redis.zrevrange(self.keys.jobs(queue), 0, limit - 1)
        return list((await self.get_many(ids)).values())

    async def depth(self, queue: str) -> QueueDepth:
        """How many jobs of a queue wait, and for how long the oldest of them has."""
        stream = self.keys.queue(queue)
        async with self.redis.pipeline(transaction=False) as pipeline:
            pipeline.xlen(stream)
            pipeline.xinfo_groups(stream)
            pipeline.zcard(self.keys.delayed(queue))
            pipeline.time()
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
        for answer in answers:
            # XINFO alone minds that there is no such stream, since no job was ever queued.
            if isinstance(answer, Exception) and not isinstance(answer, ResponseError):
                raise answer
        entries, found, delayed, clock = answers
        groups: Sequence[dict[str, Any]] = () if isinstance(found, ResponseError) else found
        group = next((one for one in groups if one["name"] == GROUP), dict[str, Any]())
        waiting: int = max(0, entries - group.get("pending", 0))
        after: str = group.get("last-delivered-id", "0-0")
        first: list[tuple[str, Any]] = await self.redis.xrange(stream, f"({after}", "+", count=1) if waiting else []
        since = int(first[0][0].partition("-")[0]) / 1000 if first else None
        now: float = clock[0] + clock[1] / 1e6
        return QueueDepth(waiting, delayed, 0.0 if since is None else max(0.0, now - since))

    async def claim(self, queue: str, worker: str, block_seconds: float = 1.0) -> Claim | None:
        """Take the oldest waiting job for `worker`, waiting up to `block_seconds` for one. The lease starts now."""
        stream = self.keys.queue(queue)
        deadline = time.monotonic() + block_seconds
        while True:
            due_ms: int = await self._call("promote", [self.keys.delayed(queue), stream], BATCH)
            left_ms = max(0, round((deadline - time.monotonic()) * 1000))
            entry, job_id = await self._next_entry(stream, worker, min(left_ms, due_ms) if due_ms >= 0 else left_ms)
            if entry:
                claim = await self._claim_entry(stream, entry, job_id, worker)
                if claim:
                    return claim
            elif time.monotonic() >= deadline:
                return None

    async def _next_entry(self, stream: str, worker: str, block_ms: int) -> tuple[str, str]:
        # BLOCK 0 would wait for ever, hence None.
        try:
            answer = await self.redis.xreadgroup(GROUP, worker, {stream: ">"}, count=1, block=block_ms or None)
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            # From 0, not `$`: jobs enqueued before the first worker are work too.
            await self._create_group(stream, GROUP)
            answer = await self.redis.xreadgroup(GROUP, worker, {stream: ">"}, count=1, block=None)
        for _, entries in answer or ():
            for entry, record in entries:
                return entry, record["job"]
        return "", ""

    async def _create_group(self, stream: str, group: str) -> None:
        try:
            await self.redis.xgroup_create(stream, group, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    async def _claim_entry(self, stream: str, entry: str, job_id: str, worker: str) -> Claim | None:
        status, flat = await self._call("claim", [self.keys.job(job_id), stream], entry, worker, uuid.uuid4().hex)
        if status != "OK":
            return None
        job = job_from(fields(flat))
        return Claim(job=job, fence=job.fence, entry=entry, worker=worker)

    async def heartbeat(self, claim: Claim, progress: dict[str, Any] | None = None) -> Beat:
        """Renew the lease and leave progress figures. LOST: another has the job, or it ended; drop the result."""
        return Beat(
            await self._call(
                "heartbeat", [self.keys.job(claim.job.id)],
                claim.fence, claim.entry, claim.worker, encode(progress) if progress is not None else "",
                round(self.settings.event_interval_seconds * 1000),
            )
        )  # fmt: skip

    async def finish(self, claim: Claim, result: dict[str, Any], *, progress: dict[str, Any] | None = None) -> None:
        """The commit point: the job succeeded with `result`, if this claim is still the latest.

        Raises:
            Fenced: It is not. What the worker made must not be used.
        """
        shown = encode(progress) if progress is not None else ""
        self._held(claim, await self._call("finish", [self.keys.job(claim.job.id)], claim.fence, encode(result), shown))

    async def fail(self, claim: Claim, problem: Problem, *, retry: bool, delay_seconds: float = 0) -> Job:
        """This attempt failed. With `retry` and attempts left it is queued again after the delay; else it failed.

        Raises:
            Fenced: The claim is stale.
        """
        status, flat = await self._call(
            "fail", [self.keys.job(claim.job.id)],
            claim.fence, problem.model_dump_json(exclude_none=True), int(retry), round(delay_seconds * 1000),
        )  # fmt: skip
        self._held(claim, status)
        return job_from(fields(flat))

    async def finish_cancelled(self, claim: Claim) -> None:
        """The running job stopped because it was cancelled. Raises Fenced when the claim is stale."""
        self._held(claim, await self._call("finish_cancelled", [self.keys.job(claim.job.id)], claim.fence))

    async def release(self, claim: Claim) -> None:
        """Give the job back unfinished at shutdown; the attempt does not count. Raises Fenced when stale."""
        self._held(claim, await self._call("release", [self.keys.job(claim.job.id)], claim.fence))

    @staticmethod
    def _held(claim: Claim, status: str) -> None:
        if status == "FENCED":
            raise Fenced(
                f"job {claim.job.id!r}: the claim of {claim.worker!r} with fence {claim.fence} is stale; another "
                "worker has the job, or it ended. The result is dropped."
            )

    async def reclaim(self, queue: str, worker: str) -> int:
        """Take jobs from workers silent for a lease and queue them again, or fail them when attempts are used up.

        Does nothing while Redis has been up for less than a lease, for owners renew first. Jobs go back to the queue,
        where whoever is free takes them, so `worker` does not matter. Returns how many entries were taken back.
        """
        del worker
        taken = 0
        lease_ms, forget_ms = round(self.settings.lease_seconds * 1000), round(FORGET_CONSUMER_SECONDS * 1000)
        while True:
            try:
                count, requeued, dead = await self._call(
                    "reclaim", [self.keys.queue(queue)], lease_ms, BATCH, forget_ms
                )
            except ResponseError as error:
                if "NOGROUP" in str(error) or "no such key" in str(error):
                    return taken
                raise
            taken += count
            JOBS_RETRIED.labels(queue, "lost").inc(requeued)
            JOBS_DEAD.labels(queue).inc(dead)
            if count < BATCH:
                return taken

    async def cancel(self, job_id: str) -> Job:
        """Cancel a waiting job at once, a running one at its worker's next heartbeat; a job that ended stays as it is.

        Raises:
            NotFound: There is no such job.
        """
        return self._found(job_id, await self._call("cancel", [self.keys.job(job_id)]))

    async def retry(self, job_id: str) -> Job:
        """Queue a failed or cancelled job again with all its attempts; other jobs stay as they are. Raises NotFound."""
        return self._found(job_id, await self._call("retry", [self.keys.job(job_id)]))

    @staticmethod
    def _found(job_id: str, flat: list[str]) -> Job:
        if not flat:
            raise NotFound(f"there is no job {job_id!r}", field="id")
        return job_from(fields(flat))

    async def read_inbox(self, consumer: str, block_seconds: float = 1.0) -> list[tuple[str, JobOutcome]]:
        """Messages for the orchestrator as (entry id, message), waiting up to `block_seconds` for some.

        A message comes again after a lease unless acknowledged. A nudge has an empty `job_id` and state `queued`.
        """
        block_ms = round(block_seconds * 1000) or None
        lease_ms = round(self.settings.lease_seconds * 1000)
        try:
            old = await self.redis.xautoclaim(self.keys.inbox, INBOX_GROUP, consumer, lease_ms, count=BATCH)
            # A message trimmed away while unacknowledged comes back without fields.
            entries = [(entry, record) for entry, record in old[1] if entry and record]
            if not entries:
                answer = await self.redis.xreadgroup(
                    INBOX_GROUP, consumer, {self.keys.inbox: ">"}, count=BATCH, block=block_ms
                )
                entries = [item for _, items in answer or () for item in items]
        except ResponseError as error:
            if "NOGROUP" not in str(error) and "no such key" not in str(error):
                raise
            await self._create_group(self.keys.inbox, INBOX_GROUP)
            return []
        return [(entry, outcome_from(record)) for entry, record in entries]

    async def ack_inbox(self, entry_ids: Sequence[str]) -> None:
        """These messages are dealt with."""
        if entry_ids:
            async with self.redis.pipeline(transaction=True) as pipeline:
                pipeline.xack(self.keys.inbox, INBOX_GROUP, *entry_ids)
                pipeline.xdel(self.keys.inbox, *entry_ids)
                await pipeline.execute()

    async def nudge(self, topic: str) -> None:
        """Wake the orchestrator for `topic`, after a change that no job tells."""
        record = {"job_id": "", "topic": topic, "state": JobState.QUEUED.value}
        await self.redis.xadd(self.keys.inbox, record, maxlen=self.settings.inbox_kept, approximate=True)
