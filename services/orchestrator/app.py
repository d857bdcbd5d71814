"""The orchestrator's HTTP surface, and the tasks behind it: the conductor and the workers of three queues."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import httpx
from fastapi import FastAPI, Request, Response
from redis.exceptions import RedisError

from services.contracts.errors import RatchetError, Unavailable
from services.orchestrator.conductor import Conductor
from services.orchestrator.handlers import handlers
from services.orchestrator.routes import routes
from services.orchestrator.runbook import Runbook
from services.orchestrator.runs import RunService
from services.orchestrator.service_health import ServiceHealthChecks
from services.orchestrator.settings import OrchestratorSettings
from services.orchestrator.snapshots import Snapshots
from services.orchestrator.trials import TrialGuard
from services.orchestrator.upstream import Upstream
from services.platform.http import ServiceClient
from services.platform.jobs import EventStream, JobQueue, JobSettings, Worker, connect
from services.platform.jobs.outage import REDIS_ERRORS
from services.platform.logs import get_logger
from services.platform.openapi import document_problems
from services.platform.service import create_service, problem_of
from services.platform.store import ArtifactStore

log = get_logger(__name__)

VERSION = "0.1.0"
STOP_SECONDS = 15.0
"""Conductor and workers end by themselves well within this; their own graces are shorter."""


def create_app(
    settings: OrchestratorSettings, *, job_settings: JobSettings | None = None,
    generator: httpx.AsyncBaseTransport | None = None, reward: httpx.AsyncBaseTransport | None = None,
    trainer: httpx.AsyncBaseTransport | None = None,
) -> FastAPI:  # fmt: skip
    """The orchestrator.

    Args:
        job_settings: Leases and intervals of the queue; the same in every process that shares it.
        generator: Transport to the generator, in tests.
        reward: Transport to the reward service, in tests.
        trainer: Transport to the trainer, in tests.
    """
    store = ArtifactStore(settings.store_url)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        # Jobs wait for a service themselves and show it; retries below them would hide that.
        generator_client = ServiceClient(
            "generator", settings.generator_url, settings.token, retry=False, transport=generator
        )
        reward_client = ServiceClient("reward", settings.reward_url, settings.token, retry=False, transport=reward)
        clients = [generator_client, reward_client]
        trainer_client = None
        if settings.trainer_url is not None:
            trainer_client = ServiceClient("trainer", settings.trainer_url, retry=False, transport=trainer)
            clients.append(trainer_client)
        redis = await connect(settings.redis_url)
        jobs = job_settings or JobSettings()
        queue, events = JobQueue(redis, jobs), EventStream(redis, jobs)
        upstream = Upstream(generator_client, reward_client, settings)
        trials = TrialGuard(upstream)
        snapshots = Snapshots(Runbook(store), queue, settings.chunks_ahead)
        conductor = Conductor(snapshots, events, settings, trials, asyncio.Lock())
        worker = Worker(
            queue,
            queues={
                "generate": settings.generate_concurrency,
                "score": settings.score_concurrency,
                "control": settings.control_concurrency,
            },
            handlers=handlers(store, upstream, queue, events),
            name=f"orchestrator-{socket.gethostname()}-{os.getpid()}",
        )
        app.state.runs = RunService(conductor, settings, trainer_client)
        app.state.service_health = ServiceHealthChecks(settings, clients, redis, store, live)
        app.state.worker, app.state.conductor, app.state.redis = worker, conductor, redis
        stop = asyncio.Event()
        tasks = [
            asyncio.create_task(conductor.run(stop), name="conductor"),
            asyncio.create_task(worker.run(stop), name="worker"),
        ]
        app.state.tasks = tasks
        try:
            yield
        finally:
            stop.set()
            _, late = await asyncio.wait(tasks, timeout=STOP_SECONDS)
            for task in late:
                log.error("task_does_not_end", task=task.get_name())
                task.cancel()
            await trials.close()
            for client in clients:
                await client.close()
            await redis.aclose()

    async def live() -> str | None:
        for task in app.state.tasks:
            if task.done():
                return f"the {task.get_name()} has ended: {'cancelled' if task.cancelled() else task.exception()}"
        for name, seconds in (
            ("conductor", app.state.conductor.seconds_since_turn),
            ("worker", app.state.worker.seconds_since_progress),
        ):
            if seconds > settings.stuck_seconds:
                return f"the {name} has made no turn for {seconds:.0f} s"
        return None

    async def ready() -> str | None:
        try:
            async with asyncio.timeout(settings.redis_seconds):
                await app.state.redis.ping()
        except REDIS_ERRORS as error:
            return f"Redis at {server_name(settings)} does not answer: {type(error).__name__}: {error}"
        try:
            async with asyncio.timeout(settings.store_seconds):
                await asyncio.to_thread(store.check)
        except RatchetError as error:
            return error.detail
        except TimeoutError:
            return f"the artifact store {settings.store_url} does not answer within {settings.store_seconds:g} s"
        return None

    app = create_service(
        "orchestrator", title="Ratchet orchestrator", version=VERSION, lifespan=lifespan, live=live, ready=ready,
        token=settings.token,
    )  # fmt: skip

    async def on_redis(request: Request, error: Exception) -> Response:
        problem = Unavailable(
            f"Redis at {server_name(settings)}: {type(error).__name__}: {error}", retry_after_seconds=5
        )
        return problem_of(problem, getattr(request.state, "request_id", None))

    app.add_exception_handler(RedisError, on_redis)
    app.include_router(routes(settings, store))
    document_problems(app)
    if settings.dashboard:
        from services.orchestrator.dashboard.mount import mount_dashboard  # importing NiceGUI takes a second

        mount_dashboard(app, settings, store)
    return app


def server_name(settings: OrchestratorSettings) -> str:
    """Host and port of the Redis URL, never its password."""
    return httpx.URL(settings.redis_url).netloc.decode()
