"""The handler of the queue `train`: finds the work done, or has a child process do it, and tells how it goes."""

from __future__ import annotations

import asyncio
import hashlib
import signal
from typing import Any

from pydantic import TypeAdapter, ValidationError

from services.contracts.errors import Cancelled, InvalidInput, JobFailed, RatchetError
from services.contracts.jobs import Job, JobRequest
from services.contracts.problems import Problem
from services.contracts.training import TrainingJob, TrainingResult
from services.platform.jobs import Handler, JobContext
from services.platform.logs import get_logger
from services.platform.service import field_errors
from services.platform.store import ArtifactStore
from services.trainer.process import END_SECONDS, Launcher, TrainingChild, TrainingKilled
from services.trainer.protocol import ChildJob, ChildMessage
from services.trainer.published import published_result
from services.trainer.settings import TrainerSettings
from services.trainer.workspace import Workspace, canonical, workspace_name

log = get_logger(__name__)

QUEUE = "train"
KINDS = ("import_model", "sft", "reward_model", "dpo")
TRAINING_JOB: TypeAdapter[TrainingJob] = TypeAdapter(TrainingJob)


def request_for(job: TrainingJob) -> JobRequest:
    """The queue's request for a job sent to our API. The id is derived from the content: sent twice, it is one job."""
    job_id = f"train/{job.kind}/{hashlib.sha256(canonical(job).encode()).hexdigest()[:16]}"
    return JobRequest(id=job_id, queue=QUEUE, kind=job.kind, payload=job.model_dump(mode="json"), topic=job_id)


def parse_job(job: Job) -> TrainingJob:
    """A queued job's payload as its contract. Raises InvalidInput naming each wrong field."""
    try:
        parsed = TRAINING_JOB.validate_python({"kind": job.kind, **job.payload})
    except ValidationError as error:
        errors = field_errors(error, skip_source=False)
        detail = "; ".join(f"{e.field}: {e.detail}" for e in errors[:5])
        raise InvalidInput(f"job {job.id}: {detail}", field=errors[0].field) from error
    if parsed.kind != job.kind:
        raise InvalidInput(f"job {job.id} is of kind {job.kind!r} and its payload says {parsed.kind!r}", field="kind")
    return parsed


class TrainingJobs:
    """Does training jobs, one at a time, each in a child process.

    Args:
        settings: Timeouts and the like.
        store: Where checkpoints are published.
        launcher: Starts the child processes.
    """

    def __init__(self, settings: TrainerSettings, store: ArtifactStore, launcher: Launcher) -> None:
        self.settings = settings
        self.store = store
        self.launcher = launcher

    def handlers(self) -> dict[str, Handler]:
        """For the worker."""
        return dict.fromkeys(KINDS, self.run)

    async def run(self, context: JobContext) -> dict[str, Any]:
        """Handle one attempt at a job.

        Raises:
            RatchetError: as the child reported it; TrainingKilled (retryable) when it was ended by a signal or hung.
        """
        job = parse_job(context.job)
        workspace = Workspace(
            await asyncio.to_thread(
                self.store.work_folder,
                f"train/{workspace_name(context.job.id, job)}",
                self.settings.trainer_work_folder,
            )
        )
        found = await asyncio.to_thread(published_result, self.store, context.job.id, job)
        if found is None:
            found = await self._train(context, job, workspace)
        await asyncio.to_thread(workspace.remove)
        return found.model_dump(mode="json")

    async def _train(self, context: JobContext, job: TrainingJob, workspace: Workspace) -> TrainingResult:
        request = ChildJob(
            job_id=context.job.id,
            job=job,
            store_url=self.store.url,
            work=str(workspace.folder),
            allow_hub=self.settings.trainer_allow_hub,
            lock_seconds=self.settings.trainer_lock_seconds,
        )
        await asyncio.to_thread(workspace.job_file.write_text, request.model_dump_json())
        child = await self.launcher.start(workspace.job_file)
        try:
            return await self._follow(context, child, workspace)
        finally:
            await child.stop(self.settings.trainer_term_seconds)
            await self.launcher.prepare_spare()

    async def _follow(self, context: JobContext, child: TrainingChild, workspace: Workspace) -> TrainingResult:
        reading = asyncio.create_task(self._read(context, child, workspace))
        ends = [asyncio.create_task(event.wait()) for event in (context.cancelled, context.lost)]
        try:
            await asyncio.wait({reading, *ends}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                return reading.result()
            raise Cancelled(f"job {context.job.id} was cancelled; its process is ended")
        finally:
            for task in (reading, *ends):
                task.cancel()

    async def _read(self, context: JobContext, child: TrainingChild, workspace: Workspace) -> TrainingResult:
        last: ChildMessage | None = None
        async for message in child.messages(self.settings.trainer_start_seconds, self.settings.trainer_stall_seconds):
            if message.progress is not None:
                context.progress(**message.progress.model_dump(mode="json", exclude_none=True))
            if message.type in ("result", "error"):
                last = message
                break
        if last is not None and last.result is not None:
            return last.result
        if last is not None and last.problem is not None:
            raise _reported(last.problem, last.retryable)
        raise _ended(await child.ended(END_SECONDS), child, workspace, context)


class _Retryable(RatchetError):
    retryable = True


def _reported(problem: Problem, retryable: bool) -> RatchetError:
    """The child's error, with the code and status it had there."""
    error = (_Retryable if retryable else RatchetError)(problem.detail, field=problem.field)
    # The classes' constants, as this one error has them: a problem must look the same on both sides of the pipe.
    for name, value in (("status", problem.status), ("code", problem.code), ("title", problem.title)):
        setattr(error, name, value)
    return error


def _ended(status: int, child: TrainingChild, workspace: Workspace, context: JobContext) -> RatchetError:
    step = (context.figures or {}).get("step", 0)
    if status < 0:
        name = signal.Signals(-status).name
        why = " (out of memory, or by hand)" if -status == signal.SIGKILL else ""
        return TrainingKilled(
            f"the training process was ended by {name}{why} at step {step}; the job goes on from its last save"
        )
    tail = (workspace.log_tail() or child.stderr_tail()).splitlines()
    last = tail[-1] if tail else "it wrote nothing"
    return JobFailed(
        f"the training process ended with status {status} and no result: {last} (log: {workspace.log_file})"
    )
