"""HTTP surface of the trainer.

Job ids contain slashes (`train/dpo/0a1b…`, `run/iter-1/train`). In a URL they stand as they are, or with each slash as
`%2F`: `GET /v1/jobs/train/dpo/0a1b…/events`.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Header, Query
from fastapi.responses import StreamingResponse

from services.contracts.errors import NotFound
from services.contracts.jobs import Job
from services.contracts.trackers import InstalledTrackers
from services.contracts.training import TrainingJob
from services.platform.auth import bearer_scheme, require_token
from services.platform.jobs import EventStream, JobQueue, Worker, connect
from services.platform.logs import get_logger
from services.platform.service import create_service
from services.platform.store import ArtifactStore
from services.trainer.events import job_events
from services.trainer.jobs import QUEUE, TrainingJobs, parse_job, request_for, trackers_of
from services.trainer.process import Launcher
from services.trainer.published import published_result
from services.trainer.settings import TrainerSettings
from services.trainer.trackers import check_installed, installed
from services.trainer.workspace import canonical, remove_old

log = get_logger(__name__)

VERSION = "0.1.0"
STUCK_SECONDS = 60.0
"""The worker turns at least once a second; so long without a turn, it hangs."""


class Trainer:
    """What the routes share. Made by the lifespan, since a Redis connection belongs to one event loop."""

    def __init__(self, settings: TrainerSettings) -> None:
        self.settings = settings
        self.store = ArtifactStore(settings.store_url)
        self.launcher = Launcher(settings)
        self.stop = asyncio.Event()
        self.queue: JobQueue
        self.events: EventStream
        self.worker: Worker

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Work on the queue until the service stops."""
        redis = await connect(self.settings.redis_url)
        self.queue, self.events = JobQueue(redis), EventStream(redis)
        jobs = TrainingJobs(self.settings, self.store, self.launcher)
        name = f"trainer-{socket.gethostname()}-{os.getpid()}"
        self.worker = Worker(self.queue, queues={QUEUE: 1}, handlers=jobs.handlers(), name=name)
        work = await asyncio.to_thread(self.store.work_folder, "train", self.settings.trainer_work_folder)
        removed = await asyncio.to_thread(remove_old, work, self.settings.trainer_work_keep_days)
        if removed:
            log.info("old_work_removed", folders=removed)
        await self.launcher.prepare_spare()
        task = asyncio.create_task(self.worker.run(self.stop))
        try:
            yield
        finally:
            self.stop.set()
            await task
            await jobs.device.close()
            await self.launcher.close()
            await redis.aclose()

    async def live(self) -> str | None:
        """The worker turns."""
        age = self.worker.seconds_since_progress
        return f"the worker has not turned for {age:.0f} s" if age > STUCK_SECONDS else None

    async def ready(self) -> str | None:
        """Redis answers and the store can be written."""
        if self.worker.redis_error:
            return self.worker.redis_error
        try:
            await self.queue.list(QUEUE, 1)
            await asyncio.to_thread(self.store.check)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    async def job(self, job_id: str) -> Job:
        """A job of the queue `train`. Raises NotFound."""
        job = await self.queue.get(job_id)
        if job is None or job.queue != QUEUE:
            raise NotFound(f"there is no training job {job_id!r}; GET /v1/jobs lists them", field="job_id")
        return job


def build_app(settings: TrainerSettings) -> FastAPI:
    """The trainer as an app: API and worker in one process."""
    trainer = Trainer(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with trainer.running():
            yield

    app = create_service(
        "trainer", title="Ratchet trainer", version=VERSION, lifespan=lifespan, live=trainer.live, ready=trainer.ready,
        token=settings.token,
    )  # fmt: skip
    app.state.trainer = trainer
    _add_routes(app, trainer, [Depends(bearer_scheme), Depends(require_token(settings.token))])
    return app


def _add_routes(app: FastAPI, trainer: Trainer, control: list[Depends]) -> None:  # pyright: ignore[reportGeneralTypeIssues]
    @app.post("/v1/jobs", status_code=202, tags=["jobs"], dependencies=control, summary="Queue a training job")
    async def submit(job: TrainingJob) -> Job:  # pyright: ignore[reportUnusedFunction]
        """The id is derived from the content: the same job twice is one job. 409: its output is another job's.

        422 also when `config.report_to` names a tracker that is not installed here (`GET /v1/trackers`).
        """
        check_installed(trackers_of(job))
        request = request_for(job)
        await asyncio.to_thread(published_result, trainer.store, request.id, job)
        known = await trainer.queue.get(request.id)
        if known is not None and known.queue == QUEUE and canonical(parse_job(known)) == canonical(job):
            return known  # as it was first sent, also if this one names other trackers
        return await trainer.queue.enqueue(request)

    @app.get("/v1/trackers", tags=["trackers"], summary="Trackers that report_to may name")
    async def trackers() -> InstalledTrackers:  # pyright: ignore[reportUnusedFunction]
        """What is installed where the trainings run; whether it is set up and reached is seen by a training."""
        return InstalledTrackers(trackers=await asyncio.to_thread(installed))

    @app.get("/v1/jobs", tags=["jobs"], summary="Training jobs, newest first")
    async def jobs(limit: int = Query(100, ge=1, le=1000)) -> list[Job]:  # pyright: ignore[reportUnusedFunction]
        return await trainer.queue.list(QUEUE, limit)

    # Before the plain id, which would swallow the suffix.
    @app.get(
        "/v1/jobs/{job_id:path}/events", tags=["jobs"], summary="A job's events, live (SSE)",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}, "description": "`data` is an `Event` as JSON."}},
    )  # fmt: skip
    async def events(  # pyright: ignore[reportUnusedFunction]
        job_id: str, last_event_id: str = Header("0", description="Continue after this event.")
    ) -> StreamingResponse:
        """History first, then live; ends with the job. Field `id` of each event goes into `Last-Event-ID`."""
        job = await trainer.job(job_id)
        await trainer.events.read(job.topic, last_event_id, 1)  # a wrong id is told before the stream starts
        stream = job_events(trainer.queue, trainer.events, job, last_event_id, app.state.draining.event)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @app.post("/v1/jobs/{job_id:path}/retry", status_code=202, tags=["jobs"], dependencies=control, summary="Try again")
    async def retry(job_id: str) -> Job:  # pyright: ignore[reportUnusedFunction]
        """A failed or cancelled job is queued again, and goes on from its last save. Others stay as they are."""
        await trainer.job(job_id)
        return await trainer.queue.retry(job_id)

    @app.get("/v1/jobs/{job_id:path}", tags=["jobs"], summary="One job")
    async def job(job_id: str) -> Job:  # pyright: ignore[reportUnusedFunction]
        return await trainer.job(job_id)

    @app.delete("/v1/jobs/{job_id:path}", status_code=202, tags=["jobs"], dependencies=control, summary="Cancel")
    async def cancel(job_id: str) -> Job:  # pyright: ignore[reportUnusedFunction]
        """A waiting job ends at once, a running one within seconds. A job that has ended stays as it is."""
        await trainer.job(job_id)
        return await trainer.queue.cancel(job_id)
