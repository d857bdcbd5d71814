"""How the services are: whatever they answer, or do not, is an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from redis.exceptions import ConnectionError as RedisConnectionError

from services.contracts.errors import StoreError
from services.contracts.health import ServiceHealth
from services.orchestrator.service_health import ServiceHealthChecks
from services.orchestrator.settings import OrchestratorSettings
from services.platform.http import ServiceClient
from services.platform.store import ArtifactStore

Answer = Callable[[httpx.Request], httpx.Response]
REDIS_URL = "redis://:secret-word@127.0.0.1:6379/0"


class FakeRedis:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.pings = 0

    async def ping(self) -> bool:
        self.pings += 1
        if self.error is not None:
            raise self.error
        return True


def checks(
    tmp_path: Path, *, generator: Answer | None = None, reward: Answer | None = None, redis: Any = None,
    live: str | None = None, **settings: Any,
) -> ServiceHealthChecks:  # fmt: skip
    store = ArtifactStore(str(tmp_path / "store"))
    values = {"health_age_seconds": 0.0, **settings}
    known = OrchestratorSettings(token=SecretStr("t" * 16), store_url=store.url, redis_url=REDIS_URL, **values)
    answers = {"generator": generator or healthy, "reward": reward or healthy}
    clients = [
        ServiceClient(name, f"http://user:pass@{name}:80", retry=False, transport=httpx.MockTransport(answer))
        for name, answer in answers.items()
    ]

    client_of_redis: Any = redis or FakeRedis()

    async def alive() -> str | None:
        return live

    return ServiceHealthChecks(known, clients, client_of_redis, store, alive)


def healthy(request: httpx.Request) -> httpx.Response:
    if request.url.path == "/v1/policy":
        return httpx.Response(200, json={"state": "serving", "version": "r/iter-2"})
    if request.url.path == "/v1/scorers":
        spec = {"kind": "bradley_terry", "checkpoint": "models/rm"}
        scorer = {
            "name": "default", "spec": spec, "revision": "models/rm", "template_hash": "t", "parameters": 1,
            "dtype": "float32", "proofs": {},
        }  # fmt: skip
        return httpx.Response(200, json=[scorer])
    return httpx.Response(200, json={"status": "ok", "detail": None})


async def look(checked: ServiceHealthChecks) -> dict[str, ServiceHealth]:
    return {one.name: one for one in await checked.look()}


async def test_ready_services_say_what_they_serve_and_no_password_is_shown(tmp_path: Path) -> None:
    found = await look(checks(tmp_path))
    assert list(found) == ["orchestrator", "generator", "reward", "redis", "store"]
    assert {one.state for one in found.values()} == {"ready"}
    assert found["generator"].serving == ("r/iter-2",)
    assert found["reward"].serving == ("default: models/rm",)
    assert found["redis"].url == "redis://127.0.0.1:6379/0"
    assert found["generator"].url == "http://generator:80"
    assert all(one.seconds is not None for one in found.values())


async def test_a_service_that_is_not_ready_says_why_in_its_own_words(tmp_path: Path) -> None:
    def starting(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/health/ready":
            return httpx.Response(503, json={"status": "unavailable", "detail": "vLLM is starting"})
        return httpx.Response(200, json={"state": "starting"})

    def broken(request: httpx.Request) -> httpx.Response:
        return httpx.Response(500, text="oops")

    found = await look(checks(tmp_path, generator=starting, reward=broken, live="the worker has ended"))
    assert (found["generator"].state, found["generator"].detail) == ("not_ready", "vLLM is starting")
    assert found["generator"].serving == ()
    assert (found["reward"].state, found["reward"].detail) == ("not_ready", "GET /health/ready answered 500: oops")
    assert (found["orchestrator"].state, found["orchestrator"].detail) == ("not_ready", "the worker has ended")


async def test_what_does_not_answer_is_unreachable_and_the_others_are_still_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused")

    def other(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"never": "seen"})

    def refuse(self: ArtifactStore) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(ArtifactStore, "check", refuse)
    away = FakeRedis(RedisConnectionError(f"cannot connect to {REDIS_URL}"))
    found = await look(checks(tmp_path, generator=gone, reward=other, redis=away))
    for name, says in (
        ("generator", "connection refused"), ("reward", "ValidationError"), ("redis", "cannot connect"),
        ("store", "the disk is full"),
    ):  # fmt: skip
        assert found[name].state == "unreachable"
        assert says in (found[name].detail or "")
    assert found["orchestrator"].state == "ready"
    assert "secret-word" not in str(found)


async def test_a_service_that_hangs_costs_no_more_than_its_deadline(tmp_path: Path) -> None:
    never = asyncio.Event()

    class Hanging(FakeRedis):
        async def ping(self) -> bool:
            return await never.wait()

    found = await look(checks(tmp_path, redis=Hanging(), health_seconds=0.05))
    assert (found["redis"].state, found["redis"].detail) == ("unreachable", "no answer within 0.05 s")


async def test_many_who_look_at_once_are_one_look(tmp_path: Path) -> None:
    redis = FakeRedis()
    checked = checks(tmp_path, redis=redis, health_age_seconds=60.0)
    found = await asyncio.gather(*(checked.look() for _ in range(5)))
    assert redis.pings == 1
    assert all(one == found[0] for one in found)
