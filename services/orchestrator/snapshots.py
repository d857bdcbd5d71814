"""A run as it stands: what the store says, what the queue says, and the plan that follows."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from services.contracts.jobs import Job, JobState
from services.contracts.runs import IterationRecord, RunControl, RunRecord, Stage
from services.orchestrator import stages
from services.orchestrator.planner import Plan, plan
from services.orchestrator.runbook import Runbook
from services.platform.jobs import JobQueue


@dataclass(frozen=True)
class Snapshot:
    """One run at one moment."""

    record: RunRecord
    control: RunControl
    decided: dict[int, IterationRecord]
    jobs: dict[str, Job]
    plan: Plan


class Snapshots:
    """Takes snapshots. Jobs that succeeded are remembered: they never change, and what they made is in the store."""

    def __init__(self, runbook: Runbook, queue: JobQueue, chunks_ahead: int) -> None:
        self.runbook = runbook
        self.queue = queue
        self._chunks_ahead = chunks_ahead
        self._succeeded: dict[str, tuple[int, dict[str, Job]]] = {}

    async def take(self, run: str) -> Snapshot:
        """Raises NotFound (no such run) and what Redis raises."""
        record, control, decided = await asyncio.to_thread(self._stored, run)
        jobs = {job.id: job for job in (decide_job(done) for done in decided.values())}
        ids = [stages.rollback_id(run, number) for number in range(len(control.rollbacks))]
        iteration = len(decided)
        if iteration <= control.iterations:
            ids += list(stages.iteration_ids(record, iteration))
        known_of, known = self._succeeded.get(run, (iteration, {}))
        if known_of != iteration:
            known = {}
        jobs.update(known)
        jobs.update(await self.queue.get_many([id for id in ids if id not in known]))
        self._succeeded[run] = (iteration, {id: jobs[id] for id in ids if id in jobs and _settled(jobs[id])})
        return Snapshot(record, control, decided, jobs, plan(record, control, jobs, chunks_ahead=self._chunks_ahead))

    def _stored(self, run: str) -> tuple[RunRecord, RunControl, dict[int, IterationRecord]]:
        return self.runbook.record(run), self.runbook.control(run), self.runbook.decided(run)


def decide_job(record: IterationRecord) -> Job:
    """The decide job of an iteration whose record is published: it succeeded, whatever became of Redis since."""
    return Job(
        id=stages.job_id(record.run_id, record.iteration, Stage.DECIDE), queue="control", kind=Stage.DECIDE.value,
        payload={}, topic=record.run_id, max_attempts=1, state=JobState.SUCCEEDED, enqueued_at=0.0,
        result={"decision": record.decision},
    )  # fmt: skip


def _settled(job: Job) -> bool:
    return job.state is JobState.SUCCEEDED
