"""How the services are: each is asked at once, within a deadline, and whatever comes of it is an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import httpx
from pydantic import TypeAdapter
from redis.asyncio import Redis

from services.contracts.checkpoints import PolicyInfo
from services.contracts.errors import RatchetError
from services.contracts.health import ServiceHealth
from services.contracts.scores import ScorerInfo
from services.orchestrator.settings import OrchestratorSettings
from services.platform.http import ServiceClient
from services.platform.logs import get_logger
from services.platform.store import ArtifactStore
from services.platform.urls import without_password

log = get_logger(__name__)

ServiceName = Literal["orchestrator", "generator", "reward", "trainer", "redis", "store"]
SCORERS = TypeAdapter(list[ScorerInfo])


@dataclass(frozen=True)
class _Found:
    """What one service said. `detail` says why it is not ready."""

    detail: str | None = None
    serving: tuple[str, ...] = ()


class ServiceHealthChecks:
    """Looks at all services.

    Args:
        clients: The generator, the reward service and, when its URL is known, the trainer.
        live: Whether this orchestrator makes progress: None, or what is wrong.
    """

    def __init__(
        self, settings: OrchestratorSettings, clients: Sequence[ServiceClient], redis: Redis, store: ArtifactStore,
        live: Callable[[], Awaitable[str | None]],
    ) -> None:  # fmt: skip
        self._settings = settings
        self._clients = clients
        self._redis = redis
        self._store = store
        self._live = live
        self._lock = asyncio.Lock()
        self._seen: tuple[ServiceHealth, ...] = ()
        self._seen_at = float("-inf")
        self._probe: asyncio.Task[None] | None = None

    async def look(self) -> tuple[ServiceHealth, ...]:
        """All services as they are, at most `health_age_seconds` ago. Takes `health_seconds` at most; never raises."""
        async with self._lock:  # many who look at once are one look
            if time.monotonic() - self._seen_at > self._settings.health_age_seconds:
                self._seen = tuple(await asyncio.gather(*self._looks()))
                self._seen_at = time.monotonic()
            return self._seen

    def _looks(self) -> list[Awaitable[ServiceHealth]]:
        known: dict[str, tuple[ServiceName, Callable[[ServiceClient], Awaitable[_Found]]]] = {
            "generator": ("generator", self._generator),
            "reward": ("reward", self._reward),
            "trainer": ("trainer", _ready),
        }
        looks: list[Awaitable[ServiceHealth]] = [self._look("orchestrator", None, self._orchestrator)]
        for client in self._clients:
            name, ask = known[client.name]
            looks.append(self._look(name, client.base_url, lambda ask=ask, client=client: ask(client)))
        looks.append(self._look("redis", self._settings.redis_url, self._ping))
        looks.append(self._look("store", self._settings.store_url, self._check_store))
        return looks

    async def _look(self, name: ServiceName, url: str | None, ask: Callable[[], Awaitable[_Found]]) -> ServiceHealth:
        started = time.monotonic()
        shown = without_password(url) if url else None
        try:
            async with asyncio.timeout(self._settings.health_seconds):
                found = await ask()
        except Exception as error:
            detail = self._why(error)
            log.info("service_unreachable", service=name, error=detail)
            return ServiceHealth(name=name, url=shown, state="unreachable", detail=detail)
        return ServiceHealth(
            name=name, url=shown, state="ready" if found.detail is None else "not_ready", detail=found.detail,
            serving=found.serving, seconds=round(time.monotonic() - started, 4),
        )  # fmt: skip

    def _why(self, error: Exception) -> str:
        if isinstance(error, TimeoutError | httpx.TimeoutException):
            return f"no answer within {self._settings.health_seconds:g} s"
        if isinstance(error, RatchetError):
            return error.detail
        # Not the whole text: an error of a driver may quote the URL it was given, with its password.
        return f"{type(error).__name__}: {_without_url(str(error), self._settings.redis_url)}"

    async def _orchestrator(self) -> _Found:
        return _Found(await self._live())

    async def _generator(self, client: ServiceClient) -> _Found:
        ready, policy = await asyncio.gather(_ready(client), client.http.get("/v1/policy"))
        info = PolicyInfo.model_validate_json(policy.content) if policy.is_success else None
        return _Found(ready.detail, (info.version,) if info is not None and info.version else ())

    async def _reward(self, client: ServiceClient) -> _Found:
        ready, answer = await asyncio.gather(_ready(client), client.http.get("/v1/scorers"))
        scorers = SCORERS.validate_json(answer.content) if answer.is_success else []
        return _Found(ready.detail, tuple(f"{scorer.name}: {scorer.revision}" for scorer in scorers))

    async def _ping(self) -> _Found:
        await self._redis.ping()  # pyright: ignore[reportUnknownMemberType, reportGeneralTypeIssues]
        return _Found()

    async def _check_store(self) -> _Found:
        # A probe that hangs keeps its thread, so there is one at a time.
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(asyncio.to_thread(self._store.check))
        await asyncio.shield(self._probe)
        return _Found()


async def _ready(client: ServiceClient) -> _Found:
    """`/health/ready`: 200, or 503 with the reason."""
    answer = await client.http.get("/health/ready")
    if answer.is_success:
        return _Found()
    try:
        detail = str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        detail = f"GET /health/ready answered {answer.status_code}: {answer.text[:200].strip()}"
    return _Found(detail)


def _without_url(text: str, url: str) -> str:
    return text.replace(url, without_password(url))
