"""The frame of every service: request ids, problem+json, health, metrics, and a clean start and stop."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import SecretStr, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.contracts.errors import RatchetError
from services.contracts.problems import PROBLEM_MEDIA_TYPE, FieldError, Problem
from services.platform import metrics
from services.platform.identity import NONCE_PATTERN, ServiceIdentity, prove
from services.platform.logs import configure_logging, get_logger
from services.platform.processes import die_with_parent
from services.platform.settings import ServiceSettings
from services.platform.tracing import trace_of_request, traced

log = get_logger(__name__)

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""Any other word a caller sends as a method is counted as one, or each would be a metric series of its own."""

Health = Callable[[], Awaitable[str | None]]
"""Returns None when healthy, else one sentence that says what is wrong."""

SCRAPE_READY_SECONDS = 3.0
"""Prometheus gives a scrape 10 s by default; a readiness check that takes longer than this counts as not ready."""

MoreMetrics = Callable[[], Awaitable[bytes]]
"""Metrics of something behind the service, in Prometheus' text format; none of the names may be ours."""


class Draining:
    """Set once the process was told to stop; endless streams end when they see it."""

    def __init__(self) -> None:
        self.event = asyncio.Event()


def create_service(
    name: str,
    *,
    title: str,
    version: str,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
    live: Health | None = None,
    ready: Health | None = None,
    token: SecretStr | None = None,
) -> FastAPI:
    """A FastAPI app with everything services share.

    Args:
        name: Short name, used as metric label and in logs (`generator`, …).
        live: Is work progressing? Failing means: restart me. Default: the event loop answers.
        ready: May requests be sent? It says whether the right model is loaded and dependencies answer.
        token: The stack's, to prove to whoever knows it that this service is of its stack; None leaves that route out.
    """
    app = FastAPI(title=title, version=version, lifespan=lifespan)
    app.state.draining = Draining()
    _install_problem_handlers(app)

    async def answer(check: Health | None) -> JSONResponse:
        detail = await check() if check else None
        body = {"status": "ok" if detail is None else "unavailable", "service": name, "detail": detail}
        return JSONResponse(body, status_code=200 if detail is None else 503)

    @app.get("/health/live", tags=["health"], summary="Liveness: work progresses")
    async def health_live() -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        return await answer(live)

    @app.get("/health/ready", tags=["health"], summary="Readiness: the right model is loaded, dependencies answer")
    async def health_ready() -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        return await answer(ready)

    if token is not None:

        @app.get("/health/identity", tags=["health"], summary="Proof that this service knows the stack's token")
        async def health_identity(  # pyright: ignore[reportUnusedFunction]
            nonce: Annotated[str, Query(pattern=NONCE_PATTERN, description="16 random bytes in hex, for this call.")],
        ) -> ServiceIdentity:
            """Neither side sends the token: `proof` is an HMAC of the service's name and the nonce.

            Preflight asks this of whoever holds a port of the stack. Only who has the token can answer, or check it.
            """
            return prove(token, name, nonce)

    app.state.more_metrics = []
    metrics.announce(name, version)

    @app.get("/metrics", tags=["health"], summary="Prometheus metrics")
    async def scrape() -> Response:  # pyright: ignore[reportUnusedFunction]
        metrics.SERVICE_READY.labels(name).set(await _ready_now(ready))
        sources: list[MoreMetrics] = app.state.more_metrics
        more = [await source() for source in sources]
        return Response(b"".join([generate_latest(), *more]), media_type=CONTENT_TYPE_LATEST)

    app.add_middleware(RequestMiddleware, service=name)
    return app


async def _ready_now(ready: Health | None) -> bool:
    try:
        async with asyncio.timeout(SCRAPE_READY_SECONDS):
            return ready is None or await ready() is None
    except TimeoutError:
        return False
    except Exception:
        log.exception("readiness_check_failed")
        return False


class RequestMiddleware:
    """Pure ASGI (BaseHTTPMiddleware breaks streaming): request and trace id in and out, one log context, metrics."""

    def __init__(self, app: ASGIApp, service: str) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        trace = trace_of_request(dict(scope["headers"]))
        request_id = trace.request_id
        scope.setdefault("state", {})["request_id"] = request_id
        status = 500
        started = asyncio.get_running_loop().time()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode("latin-1"))]
            await send(message)

        with traced(trace), metrics.HTTP_IN_FLIGHT.labels(self.service).track_inprogress():
            try:
                await self.app(scope, receive, send_with_id)
            finally:
                route = getattr(scope.get("route"), "path", "unmatched")
                method = scope["method"] if scope["method"] in METHODS else "other"
                metrics.HTTP_REQUESTS.labels(self.service, method, route, status).inc()
                seconds = asyncio.get_running_loop().time() - started
                metrics.HTTP_REQUEST_SECONDS.labels(self.service, method, route).observe(seconds)


def problem_response(problem: Problem, headers: dict[str, str] | None = None) -> JSONResponse:
    """A problem as an HTTP answer."""
    return JSONResponse(
        problem.model_dump(exclude_none=True, mode="json"),
        status_code=problem.status,
        media_type=PROBLEM_MEDIA_TYPE,
        headers=headers,
    )


def problem_of(error: RatchetError, instance: str | None = None) -> JSONResponse:
    """An error of ours as an HTTP answer, with Retry-After where it is known."""
    headers: dict[str, str] = {}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_seconds)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return problem_response(error.problem(instance), headers)


def field_errors(error: RequestValidationError | ValidationError, *, skip_source: bool) -> tuple[FieldError, ...]:
    """Pydantic's findings as dotted field names with a sentence each."""
    found: list[FieldError] = []
    items = error.errors()
    places = [tuple(item["loc"]) for item in items]
    for item in items:
        loc = tuple(item["loc"])
        if item["type"] == "too_short" and any(len(other) > len(loc) and other[: len(loc)] == loc for other in places):
            continue  # pydantic counts only the valid items; the invalid one is reported itself
        place = [str(part) for part in item["loc"]]
        if skip_source and place and place[0] in ("body", "query", "path", "header"):
            place = place[1:]
        given = item.get("input")
        shown = "" if isinstance(given, dict | list) or given is None else f" (got {str(given)[:80]!r})"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key; check its spelling, or remove it"
        found.append(FieldError(field=".".join(place) or "body", detail=f"{message}{shown}"))
    return tuple(found)


def _install_problem_handlers(app: FastAPI) -> None:
    def request_id(request: Request) -> str | None:
        return getattr(request.state, "request_id", None)

    async def on_ratchet(request: Request, error: Exception) -> Response:
        assert isinstance(error, RatchetError)
        return problem_of(error, request_id(request))

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError | ValidationError)
        errors = field_errors(error, skip_source=isinstance(error, RequestValidationError))
        detail = "; ".join(f"{e.field}: {e.detail}" for e in errors[:5])
        return problem_response(
            Problem(
                type="urn:ratchet:problem:invalid-input", title="Invalid input", status=422, code="invalid-input",
                detail=detail, field=errors[0].field if errors else None, errors=errors, instance=request_id(request),
            )
        )  # fmt: skip

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return problem_response(
            Problem(
                type="urn:ratchet:problem:http", title=str(error.detail), status=error.status_code, code="http",
                detail=f"{request.method} {request.url.path}: {error.detail}", instance=request_id(request),
            ),
            dict(error.headers or {}),
        )  # fmt: skip

    async def on_other(request: Request, error: Exception) -> Response:
        log.error("unhandled_error", path=request.url.path, exc_info=error)
        return problem_response(
            Problem(
                type="urn:ratchet:problem:internal", title="Internal error", status=500, code="internal",
                detail=f"{type(error).__name__}: see the service's log under the request id",
                instance=request_id(request),
            )
        )  # fmt: skip

    app.add_exception_handler(RatchetError, on_ratchet)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(ValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_other)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class _Server(uvicorn.Server):
    """Tells endless streams to end as soon as the signal comes; uvicorn would wait for them first."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._service = app

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._service.state.draining.event.set()
        super().handle_exit(sig, frame)


def run_service(name: str, build: Callable[[], FastAPI], settings: ServiceSettings) -> None:
    """Run a service until SIGTERM or SIGINT. Exits 3 with a clear line when the port is in use."""
    die_with_parent()
    configure_logging(name, level=settings.log_level, fmt=settings.log_format)
    listener = socket.socket(socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        print(
            f"{name}: cannot listen on {settings.host}:{settings.port}: {error.strerror}. Stop what uses the port "
            f"(ss -ltnp 'sport = :{settings.port}' shows it), or set RATCHET_PORT to a free one.",
            file=sys.stderr,
        )
        raise SystemExit(3) from error
    app = build()
    config = uvicorn.Config(
        app, log_config=None, timeout_graceful_shutdown=settings.shutdown_grace_seconds, timeout_keep_alive=75
    )
    log.info("service_starting", host=settings.host, port=listener.getsockname()[1], pid=os.getpid())
    asyncio.run(_Server(config, app).serve(sockets=[listener]))
