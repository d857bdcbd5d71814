"""HTTP surface of the generator."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request
from fastapi import Response as HttpResponse
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from services.contracts.checkpoints import PolicyInfo, PolicySpec
from services.contracts.device import DeviceLease, Holder, LeaseRequest
from services.contracts.errors import PolicyMismatch, RatchetError, Unavailable
from services.contracts.rollouts import RolloutLine, RolloutRequest
from services.generator import metrics
from services.generator.engine_metrics import EngineMetrics
from services.generator.gate import RETRY_SECONDS, Gate
from services.generator.passthrough import openai_error, pass_through
from services.generator.policy import PolicyServer, StartEngine, start_engine
from services.generator.rollouts import RolloutSampler, check_lengths
from services.generator.settings import GeneratorSettings
from services.generator.turns import Turns
from services.generator.watch import Watcher
from services.platform.auth import require_token
from services.platform.logs import get_logger
from services.platform.service import create_service
from services.platform.store import ArtifactStore

log = get_logger(__name__)

NDJSON = "application/x-ndjson"


class HeldStream(StreamingResponse):
    """A stream that lets go of what it holds (its place at the gate), also when it never began."""

    media_type = NDJSON  # what /openapi.json says of the route

    def __init__(self, lines: AsyncIterator[bytes], held: AsyncExitStack, headers: dict[str, str]) -> None:
        super().__init__(lines, media_type=NDJSON, headers=headers)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream, then let go."""
        async with self._held:
            try:
                await super().__call__(scope, receive, send)
            finally:
                if (aclose := getattr(self.body_iterator, "aclose", None)) is not None:
                    await aclose()


def create_app(settings: GeneratorSettings, start: StartEngine = start_engine) -> FastAPI:
    """The generator's app. `start` starts an engine; tests bring their own."""
    gate = Gate(
        wait_seconds=settings.generator_gate_wait_seconds,
        trial_wait_seconds=settings.generator_trial_wait_seconds,
        max_outside=settings.generator_max_outside_requests,
        max_rollouts=settings.generator_max_rollout_requests,
    )
    policy = PolicyServer(settings, ArtifactStore(settings.store_url), gate, start)
    turns = Turns(settings, policy)
    watcher = Watcher(policy, settings)
    slots = asyncio.Semaphore(settings.generator_rollout_concurrency)

    async def load_first() -> None:
        if settings.generator_policy is None:
            return
        while await policy.leases.free(math.inf):
            try:
                await policy.put(PolicySpec(checkpoint=settings.generator_policy))
            except RatchetError as error:
                if policy.leases.blocked():
                    continue  # leased in between
                log.error("first_policy_failed", checkpoint=settings.generator_policy, detail=error.detail)
            return

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        policy.leases.begin_grace()
        tasks = [asyncio.create_task(watcher.run()), asyncio.create_task(load_first())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await turns.close()
            await policy.close()

    async def ready() -> str | None:
        return policy.unready()

    app = create_service(
        "generator", title="Ratchet generator", version="1", lifespan=lifespan, live=watcher.dead, ready=ready,
        token=settings.token,
    )  # fmt: skip
    app.state.policy = policy
    app.state.more_metrics.append(EngineMetrics(policy))
    control = [Depends(require_token(settings.token))]

    @app.get("/v1/policy", tags=["policy"], summary="Which policy is served, and in what state")
    async def get_policy() -> PolicyInfo:  # pyright: ignore[reportUnusedFunction]
        return policy.info()

    @app.put("/v1/policy", tags=["policy"], summary="Serve a checkpoint: hot swap, proven", dependencies=control)
    async def put_policy(spec: PolicySpec, response: HttpResponse) -> PolicyInfo:  # pyright: ignore[reportUnusedFunction]
        info = await policy.put(spec)
        if info.state in ("starting", "swapping"):
            response.status_code = 202
        return info

    @app.put("/v1/device/lease", tags=["device"], summary="Take the device, or renew the lease", dependencies=control)
    async def put_lease(body: LeaseRequest, request: Request) -> DeviceLease:  # pyright: ignore[reportUnusedFunction]
        """vLLM finishes, and sleeps until the lease is given back or runs out. Needs RATCHET_GENERATOR_SLEEP."""
        return await turns.lend(body, request.is_disconnected)

    @app.delete("/v1/device/lease", tags=["device"], summary="Give the device back: vLLM wakes", dependencies=control)
    async def delete_lease(holder: Annotated[Holder, Query()]) -> PolicyInfo:  # pyright: ignore[reportUnusedFunction]
        """Answers at once; the policy is served when it is proven again, see `GET /v1/policy`."""
        return turns.give_back(holder)

    @app.post(
        "/v1/rollouts",
        tags=["rollouts"],
        summary="Sample many prompts; one NDJSON line each, in order of completion",
        dependencies=control,
        status_code=200,
        response_model=RolloutLine,
        response_class=HeldStream,
    )
    async def post_rollouts(body: RolloutRequest, request: Request) -> HttpResponse:  # pyright: ignore[reportUnusedFunction]
        async with AsyncExitStack() as held:
            await held.enter_async_context(gate.admitted("rollouts"))
            ticket = await gate.enter("rollouts")
            metrics.IN_FLIGHT.labels("rollouts").inc()
            held.callback(metrics.IN_FLIGHT.labels("rollouts").dec)
            held.callback(gate.leave, ticket)
            if ticket.version != body.policy_version:
                raise PolicyMismatch(
                    f"policy_version is {body.policy_version!r} and {ticket.version!r} is served; load the one "
                    "you want with PUT /v1/policy",
                    field="policy_version",
                )
            engine, description = policy.engine, policy.description
            if engine is None or description is None:
                raise Unavailable("vLLM has ended; it is being restarted", retry_after_seconds=RETRY_SECONDS)
            check_lengths(body.sampling, description)
            sampler = RolloutSampler(engine.client, description, body, slots, request.app.state.draining.event)
            return HeldStream(sampler.lines(), held.pop_all(), {"X-Policy-Version": ticket.version})

    async def openai(request: Request) -> HttpResponse:
        return await pass_through(request, policy)

    for path in ("/v1/chat/completions", "/v1/completions"):
        app.post(
            path,
            tags=["openai"],
            summary="OpenAI's route, answered by vLLM; X-Policy-Version names the policy",
            openapi_extra={"requestBody": {"content": {"application/json": {"schema": {"type": "object"}}}}},
        )(openai)

    @app.get("/v1/models", tags=["openai"], summary="The one model: its name never changes, `root` is its version")
    async def get_models(request: Request) -> Any:  # pyright: ignore[reportUnusedFunction]
        if policy.current is None or policy.description is None or policy.engine is None:
            reason = policy.unready() or "no policy is served"
            error = Unavailable(reason, retry_after_seconds=RETRY_SECONDS)
            return openai_error(error, getattr(request.state, "request_id", None))
        model = {
            "id": settings.generator_model_name,
            "object": "model",
            "created": created,
            "owned_by": "ratchet",
            "root": policy.current.version,
            "max_model_len": policy.description.max_model_len,
        }
        return {"object": "list", "data": [model]}

    created = int(time.time())
    return app
