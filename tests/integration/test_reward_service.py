"""The reward service over HTTP: real uvicorn, real tiny models, many callers at once."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from services.reward.app import create_app
from services.reward.settings import RewardSettings
from tests.fixtures.models import make_policy
from tests.fixtures.reward import TOKEN, FakeScorer, make_reward_model, serving

AUTH = {"Authorization": f"Bearer {TOKEN}"}
BRADLEY_TERRY = {"kind": "bradley_terry", "checkpoint": "models/rm"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    make_reward_model(root / "models/rm", seed=1)
    make_reward_model(root / "models/rm2", seed=2)
    make_policy(root / "models/sft", tied=True, seed=3, version="models/sft")
    return root


def make_app(root: Path, **settings: Any) -> FastAPI:
    return create_app(RewardSettings(token=TOKEN, store_url=str(root), reward_threads=1, **settings))  # pyright: ignore[reportArgumentType]


def connect(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers=AUTH, trust_env=False, timeout=60)


@pytest.fixture(scope="module")
def service(root: Path) -> Iterator[httpx.Client]:
    with serving(make_app(root)) as url, connect(url) as client:
        assert client.put("/v1/scorers/default", json=BRADLEY_TERRY).status_code == 200
        loaded = client.put("/v1/scorers/reference", json={"kind": "logprob", "checkpoint": "models/sft"})
        assert loaded.status_code == 200
        yield client


def item(*responses: str, content: str = "Name three colours.") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "responses": responses}


def problem(answer: httpx.Response, status: int, field: str | None = None) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json().get("field") == field
    return answer.json()["detail"]


def test_concurrent_requests_score_as_one_by_one(service: httpx.Client) -> None:
    items = [item(*("Red. " * (1 + (i * j) % 17) for j in range(4)), content=f"Question {i}") for i in range(24)]
    alone = [service.post("/v1/score", json={"items": [one]}).json()["scores"][0] for one in items]

    async def together() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=service.base_url, trust_env=False, timeout=60) as client:
            return await asyncio.gather(*(client.post("/v1/score", json={"items": [one]}) for one in items))

    answers = asyncio.run(together())
    assert [answer.status_code for answer in answers] == [200] * len(items)
    for answer, expected in zip(answers, alone, strict=True):
        assert answer.json()["scores"][0] == pytest.approx(expected, abs=1e-4)
    at_once = service.post("/v1/score", json={"items": items}).json()
    assert at_once["revision"] == "models/rm"
    for got, expected in zip(at_once["scores"], alone, strict=True):
        assert got == pytest.approx(expected, abs=1e-4)


def test_log_probs_over_http(service: httpx.Client) -> None:
    body = {"items": [{"prompt_token_ids": [1, 5, 6], "response_token_ids": [[9, 2], [9]]}]}
    both, first = service.post("/v1/logprobs", json=body).json()["logprobs"][0]
    assert both < first < 0
    body["items"][0]["response_token_ids"][1] = [9999]
    assert "outside the vocabulary" in problem(
        service.post("/v1/logprobs", json=body), 422, "items.0.response_token_ids.1.0"
    )


def test_bad_items_are_named(service: httpx.Client) -> None:
    long = {"items": [item("a"), item("b", "c" * 2000)]}
    assert "at most 256" in problem(service.post("/v1/score", json=long), 422, "items.1.responses.1")
    problem(service.post("/v1/score", json={"items": [item("a", "")]}), 422, "items.0.responses.1")
    problem(service.post("/v1/score", json={"items": []}), 422, "items")
    problem(service.post("/v1/score", json={"items": [item("a")], "scoerr": 1}), 422, "scoerr")


def test_the_wrong_scorer_revision_or_kind_is_refused(service: httpx.Client) -> None:
    items = [item("a")]
    detail = problem(service.post("/v1/score", json={"scorer": "gold", "items": items}), 404, "scorer")
    assert "default (bradley_terry), reference (logprob)" in detail
    problem(service.post("/v1/score", json={"revision": "models/other", "items": items}), 409, "revision")
    assert service.post("/v1/score", json={"revision": "models/rm", "items": items}).status_code == 200
    problem(service.post("/v1/score", json={"scorer": "reference", "items": items}), 422, "scorer")
    problem(service.get("/v1/scorers/gold"), 404, "scorer")


def test_scorers_are_put_listed_replaced_and_deleted(service: httpx.Client) -> None:
    first = service.put("/v1/scorers/mine", json=BRADLEY_TERRY)
    assert service.put("/v1/scorers/mine", json=BRADLEY_TERRY).json() == first.json()
    assert service.get("/v1/scorers/mine").json()["proofs"]["padded_batch"] < 1e-3
    refused = service.put("/v1/scorers/mine", json=BRADLEY_TERRY | {"checkpoint": "models/absent"})
    assert "MANIFEST.json" in problem(refused, 422, "checkpoint")
    assert service.get("/v1/scorers/mine").json() == first.json()
    second = service.put("/v1/scorers/mine", json=BRADLEY_TERRY | {"checkpoint": "models/rm2", "truncate": "left"})
    assert second.json()["revision"] == "models/rm2"
    assert second.json()["template_hash"] != first.json()["template_hash"]
    cut = service.post("/v1/score", json={"scorer": "mine", "items": [item("c" * 5000)]})
    assert cut.status_code == 200
    assert [info["name"] for info in service.get("/v1/scorers").json()] == ["default", "mine", "reference"]
    assert service.delete("/v1/scorers/mine").status_code == 204
    problem(service.delete("/v1/scorers/mine"), 404, "scorer")


def test_control_routes_need_the_token(service: httpx.Client) -> None:
    for method in ("PUT", "DELETE"):
        answer = httpx.request(method, f"{service.base_url}/v1/scorers/x", json=BRADLEY_TERRY, trust_env=False)
        problem(answer, 401, "authorization")


def flip_a_byte(folder: Path) -> None:
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (flip_a_byte, "model.safetensors has SHA-256"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "bytes and the manifest says"),
        (lambda folder: (folder / "training_args.bin").write_bytes(b"x"), "pickle"),
        (lambda folder: (folder / "notes.txt").write_text("x"), "not in the manifest"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "not in the folder"),
        (lambda folder: (folder / "link.json").symlink_to("/etc/hostname"), "is a link"),
    ],
)
def test_a_spoilt_folder_is_refused(tmp_path: Path, spoil: Callable[[Path], object], reason: str) -> None:
    make_reward_model(tmp_path / "models/rm", seed=1)
    with serving(make_app(tmp_path)) as url, connect(url) as client:
        assert client.put("/v1/scorers/default", json=BRADLEY_TERRY).status_code == 200  # its hashes are known by now
        assert client.delete("/v1/scorers/default").status_code == 204
        spoil(tmp_path / "models/rm")
        assert reason in problem(client.put("/v1/scorers/default", json=BRADLEY_TERRY), 422, "checkpoint")


def test_a_broken_model_never_serves_and_readiness_says_why(tmp_path: Path) -> None:
    make_reward_model(tmp_path / "models/rm", seed=1, change=lambda model: model.score.weight.fill_(float("nan")))
    with serving(make_app(tmp_path)) as url, connect(url) as client:
        assert "PUT /v1/scorers/{name}" in client.get("/health/ready").json()["detail"]
        assert "gives nan" in problem(client.put("/v1/scorers/default", json=BRADLEY_TERRY), 422, "checkpoint")
        ready = client.get("/health/ready")
        assert ready.status_code == 503
        assert "gives nan" in ready.json()["detail"]
        assert client.get("/health/live").status_code == 200
        problem(client.post("/v1/score", json={"items": [item("a")]}), 404, "scorer")


def test_a_scorer_of_the_settings_is_loaded_at_start(root: Path) -> None:
    with serving(make_app(root, reward_scorers={"default": BRADLEY_TERRY})) as url, connect(url) as client:
        deadline = time.monotonic() + 60
        while client.get("/health/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert client.post("/v1/score", json={"items": [item("a")]}).status_code == 200
        assert 'ratchet_reward_responses_scored_total{scorer="default"}' in client.get("/metrics").text


@pytest.fixture
def gated(root: Path) -> Iterator[tuple[FastAPI, FakeScorer, httpx.Client]]:
    """A service whose real scorer waits at a gate, so that its queue fills."""
    app = make_app(root, reward_max_queued_tokens=60, reward_stuck_seconds=1e-6)
    with serving(app) as url, connect(url) as client:
        assert client.put("/v1/scorers/default", json=BRADLEY_TERRY).status_code == 200
        gate = FakeScorer()
        scorer = app.state.registry._scorers["default"]
        evaluate = scorer.evaluate

        def held(sequences: Any) -> list[float]:
            gate.evaluate(sequences)
            return evaluate(sequences)

        scorer.evaluate = held
        yield app, gate, client
        gate.gate.set()


async def queued(app: FastAPI, sequences: int) -> None:
    deadline = time.monotonic() + 20
    for _ in range(10_000):
        if len(app.state.queue._entries) == sequences:
            return
        assert time.monotonic() < deadline, f"the queue never held {sequences} sequences"
        await asyncio.sleep(0.005)


async def test_overload_is_429_with_retry_after_and_a_gone_caller_s_work_is_dropped(
    gated: tuple[FastAPI, FakeScorer, httpx.Client],
) -> None:
    app, gate, client = gated
    gate.gate.clear()
    async with httpx.AsyncClient(base_url=client.base_url, trust_env=False, timeout=60) as caller:
        running = asyncio.create_task(caller.post("/v1/score", json={"items": [item("first")]}))
        assert await asyncio.to_thread(gate.entered.wait, 20)
        stuck = await caller.get("/health/live")
        assert stuck.status_code == 503
        assert "1 sequences" in stuck.json()["detail"]
        goes = asyncio.create_task(caller.post("/v1/score", json={"items": [item("second")]}))
        await queued(app, 1)
        full = await caller.post("/v1/score", json={"items": [item("third " * 12)]})
        problem(full, 429)
        assert int(full.headers["retry-after"]) >= 1
        goes.cancel()
        await queued(app, 0)
        gate.gate.set()
        assert (await running).status_code == 200
        assert (await caller.post("/v1/score", json={"items": [item("fourth")]})).status_code == 200
    assert len(gate.batches) == 2


async def test_nan_at_serving_time_is_an_error_naming_the_response(
    gated: tuple[FastAPI, FakeScorer, httpx.Client],
) -> None:
    app, _, client = gated
    app.state.registry._scorers["default"].evaluate = lambda sequences: [0.0, float("nan")][: len(sequences)]
    answer = await asyncio.to_thread(client.post, "/v1/score", json={"items": [item("a", "b")]})
    assert "nan" in problem(answer, 502, "items.0.responses.1")


def test_the_process_starts_serves_and_stops(root: Path) -> None:
    import signal
    import subprocess
    import sys

    from services.platform.service import free_port

    port = free_port()
    env = os.environ | {"RATCHET_TOKEN": TOKEN, "RATCHET_STORE_URL": str(root), "RATCHET_PORT": str(port)}
    process = subprocess.Popen([sys.executable, "-m", "services.reward"], env=env, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 140  # nearly all of it is importing torch and transformers on a busy machine
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health/live", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                assert process.poll() is None, "the process ended at start"
            assert time.monotonic() < deadline, "the process did not answer within 140 s"
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)  # uvicorn raises the signal again once it has shut down
    finally:
        process.kill()
