"""The handler of the queue `train`: finds the work done, or has a child process do it, and tells how it goes."""

from __future__ import annotations

import asyncio
import hashlib
import signal
from contextlib import nullcontext
from typing import Any

from pydantic import TypeAdapter, ValidationError

from services.contracts.errors import Cancelled, InvalidInput, JobFailed, RatchetError
from services.contracts.jobs import Job, JobRequest
from services.contracts.problems import Problem
from services.contracts.training import Tracker, TrainingJob, TrainingResult
from services.platform.jobs import Handler, JobContext
from services.platform.logs import get_logger
from services.platform.service import field_errors
from services.platform.store import ArtifactStore
from services.trainer import metrics
from services.trainer.device import DeviceLost, SharedDevice, Turn
from services.trainer.process import END_SECONDS, Launcher, TrainingChild, TrainingKilled
from services.trainer.protocol import ChildJob, ChildMessage, TrackerFailure
from services.trainer.published import published_result
from services.trainer.settings import TrainerSettings
from services.trainer.trackers import Tracking, check_installed, default_folder
from services.trainer.workspace import Workspace, canonical, workspace_name

log = get_logger(__name__)

QUEUE = "train"
KINDS = ("import_model", "sft", "reward_model", "dpo")
DEVICE_KINDS = ("sft", "reward_model", "dpo")
"""These train on the device; an import computes its few probes on the CPU."""
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
        device: The device that the generator shares, if it does.
    """

    def __init__(
        self, settings: TrainerSettings, store: ArtifactStore, launcher: Launcher, device: SharedDevice | None = None
    ) -> None:
        self.settings = settings
        self.store = store
        self.launcher = launcher
        self.device = device or SharedDevice(settings)

    def handlers(self) -> dict[str, Handler]:
        """For the worker."""
        return dict.fromkeys(KINDS, self.run)

    async def run(self, context: JobContext) -> dict[str, Any]:
        """Handle one attempt at a job.

        Raises:
            RatchetError: as the child reported it; TrainingKilled (retryable) when it was ended by a signal or hung.
        """
        job = parse_job(context.job)
        check_installed(trackers_of(job))
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
            tracking=self._tracking(),
        )
        await asyncio.to_thread(workspace.job_file.write_text, request.model_dump_json())
        async with self.device.turn(context) if job.kind in DEVICE_KINDS else nullcontext(Turn()) as turn:
            turn.child = child = await self.launcher.start(workspace.job_file)
            try:
                return await self._follow(context, child, workspace, turn)
            finally:
                await child.stop(self.settings.trainer_term_seconds)
                await self.launcher.prepare_spare()

    def _tracking(self) -> Tracking:
        settings = self.settings
        folder = default_folder(self.store, settings.trainer_log_folder, settings.trainer_work_folder)
        return Tracking(
            folder=str(folder.resolve()),
            project=settings.trainer_tracker_project,
            end_seconds=settings.trainer_tracker_end_seconds,
        )

    async def _follow(
        self, context: JobContext, child: TrainingChild, workspace: Workspace, turn: Turn
    ) -> TrainingResult:
        reading = asyncio.create_task(self._read(context, child, workspace))
        ends = [asyncio.create_task(event.wait()) for event in (context.cancelled, context.lost, turn.lost)]
        try:
            await asyncio.wait({reading, *ends}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                return reading.result()
            if turn.lost.is_set() and not (context.cancelled.is_set() or context.lost.is_set()):
                step = (context.figures or {}).get("step", 0)
                raise DeviceLost(
                    f"the device was lost at step {step}, so the training process was ended; the job goes on from its "
                    f"last save: {turn.cause}"
                )
            raise Cancelled(f"job {context.job.id} was cancelled; its process is ended")
        finally:
            for task in (reading, *ends):
                task.cancel()

    async def _read(self, context: JobContext, child: TrainingChild, workspace: Workspace) -> TrainingResult:
        last: ChildMessage | None = None
        settings, kind = self.settings, context.job.kind
        with metrics.job_figures(kind) as figures:
            async for message in child.messages(settings.trainer_start_seconds, settings.trainer_stall_seconds):
                if message.progress is not None:
                    context.progress(**message.progress.model_dump(mode="json", exclude_none=True))
                    figures.update(message.progress, child.process.pid, message.device_peak_bytes)
                if message.tracker is not None:
                    _tracker_failed(message.tracker, context)
                if message.type in ("result", "error"):
                    last = message
                    break
        if last is not None and last.result is not None:
            if last.result.resumed_from_step is not None:
                metrics.RESUMES.labels(kind).inc()
            return last.result
        if last is not None and last.problem is not None:
            raise _reported(last.problem, last.retryable)
        raise _ended(await child.ended(END_SECONDS), child, workspace, context)


def trackers_of(job: TrainingJob) -> tuple[Tracker, ...]:
    """What the job's `report_to` names; an import has none."""
    return () if job.kind == "import_model" else job.config.report_to


def _tracker_failed(failure: TrackerFailure, context: JobContext) -> None:
    log.warning("tracker_failed", tracker=failure.tracker, problem=failure.detail, then="the training goes on")
    metrics.TRACKER_FAILURES.labels(failure.tracker).inc()
    context.progress(warning=f"{failure.tracker} gets no more of this training: {failure.detail}")


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
    metrics.CHILD_DEATHS.labels("killed" if status < 0 else "exited").inc()
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
