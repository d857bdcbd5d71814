"""What a process of a local stack is doing: supervisord's view, its readiness, and whether a model is loaded."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from ratchet.local.records import REDIS, ProcessRecord
from ratchet.local.supervision import Death, ProgramState
from services.platform.healthcheck import MODEL_ROUTES, waiting_for

PROBE_SECONDS = 3.0
"""A healthy service on loopback answers its health route at once; a busy one within this."""

State = Literal["starting", "waiting", "ready", "unready", "restarting", "failed", "stopped"]
"""`ready`: serves. `waiting`: up, and waits to be given a model. `unready`: says itself that it cannot serve.
`restarting`: died, and is being started again. `failed`: died too often; supervisord gave up."""


@dataclass(frozen=True)
class ProcessStatus:
    """One line of `ratchet status`."""

    name: str
    state: State
    detail: str
    pid: int | None = None
    url: str | None = None
    started_at: float | None = None
    deaths: tuple[Death, ...] = ()
    policy_version: str | None = None

    @property
    def up(self) -> bool:
        """Whether it serves, or waits only for a model."""
        return self.state in ("ready", "waiting")

    @property
    def uptime_seconds(self) -> float | None:
        """Seconds since the present process was started."""
        return None if self.started_at is None else max(0.0, time.time() - self.started_at)


def observe(record: ProcessRecord, program: ProgramState | None, died: tuple[Death, ...]) -> ProcessStatus:
    """Status of one process, asking it when supervisord says that it runs."""
    if program is None:
        return ProcessStatus(record.name, "stopped", "not running", url=record.url, deaths=died)
    how = died[-1].how if len(died) else program.spawn_error
    last = f"; died {len(died)} time{'s' if len(died) > 1 else ''}, last: {how}" if died else ""
    policy: str | None = None
    if program.state in ("FATAL", "UNKNOWN"):
        state, detail = (
            "failed",
            how + "; supervisord gave up restarting it",
        )
    elif program.state in ("BACKOFF", "EXITED"):
        state, detail = "restarting", how
    elif program.pid is None or program.state in ("STOPPED", "STOPPING"):
        state, detail = "stopped", program.state.lower()
    else:
        state, detail, policy = _ask_redis(record) if record.name == REDIS else _ask(record)
        detail += last
    return ProcessStatus(
        record.name, state, detail, pid=program.pid, url=record.url, deaths=died, policy_version=policy,
        started_at=program.started_at if program.pid else None,
    )  # fmt: skip


def _ask_redis(record: ProcessRecord) -> tuple[State, str, None]:
    problem = ping_redis(record.url or "")
    return ("ready", "answers PING", None) if problem is None else ("starting", problem, None)


def ping_redis(url: str) -> str | None:
    """None when a Redis answers PING, else what went wrong."""
    import redis
    import redis.backoff
    import redis.retry

    try:
        client = redis.Redis.from_url(
            url, socket_timeout=PROBE_SECONDS, socket_connect_timeout=PROBE_SECONDS,
            retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0),
        )  # fmt: skip
        with client:
            client.ping()
    except (redis.RedisError, ValueError, OSError) as error:
        return str(error)
    return None


def _ask(record: ProcessRecord) -> tuple[State, str, str | None]:
    """State, detail and policy version of a service."""
    assert record.url
    with httpx.Client(base_url=record.url, timeout=PROBE_SECONDS, trust_env=False) as http:
        try:
            answer = http.get("/health/ready")
        except httpx.ConnectError:
            return "starting", "does not listen yet", None
        except httpx.HTTPError as error:
            return (
                "unready",
                f"/health/ready: {str(error) or type(error).__name__} (deadline {PROBE_SECONDS:g} s)",
                None,
            )
        detail = _detail(answer)
        waits, policy = _model(record.name, http)
        if waits:
            return "waiting", waits, None
        if answer.status_code == 200:
            return "ready", f"serves {policy}" if policy else (detail or "ready"), policy
        return "unready", detail or f"/health/ready answered {answer.status_code}", policy


def _detail(answer: httpx.Response) -> str:
    body = _json(answer)
    return str(body.get("detail") or "") if isinstance(body, dict) else ""


def _model(name: str, http: httpx.Client) -> tuple[str | None, str | None]:
    """What a service waits for (None: nothing), and the generator's policy version."""
    route = MODEL_ROUTES.get(name)
    if route is None:
        return None, None
    try:
        body = _json(http.get(route))
    except httpx.HTTPError:
        return None, None
    return waiting_for(name, body), body.get("version") if isinstance(body, dict) else None


def _json(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        return None
