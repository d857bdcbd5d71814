"""The frame of every service: problems, request ids, token, health; and the client that reads them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
import stamina
from fastapi import Depends, FastAPI
from pydantic import SecretStr, ValidationError

from services.contracts.conversations import Message
from services.contracts.errors import (
    ConnectionLost,
    DeadlineExceeded,
    NotFound,
    Overloaded,
    PolicyMismatch,
    Unavailable,
    UpstreamFailed,
)
from services.contracts.scores import ScoreItem
from services.platform.auth import require_token
from services.platform.http import RETRY_ATTEMPTS, RemoteError, ServiceClient, error_from
from services.platform.identity import is_proven, new_nonce
from services.platform.service import create_service
from services.platform.settings import ServiceSettings, settings_from_environment


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    with stamina.set_testing(True, attempts=RETRY_ATTEMPTS):
        yield


TOKEN = SecretStr("a-token-of-enough-characters")


def build() -> FastAPI:
    async def ready() -> str | None:
        return "no policy is loaded"

    app = create_service("demo", title="Demo", version="1", ready=ready, token=TOKEN)

    @app.post("/items")
    async def items(item: ScoreItem) -> ScoreItem:
        return item

    @app.get("/mismatch")
    async def mismatch() -> None:
        raise PolicyMismatch("serves a, not b", field="policy_version")

    @app.get("/busy")
    async def busy() -> None:
        raise Overloaded("512 items wait", retry_after_seconds=2.4)

    @app.get("/crash")
    async def crash() -> None:
        raise KeyError("secret detail")

    @app.put("/control", dependencies=[Depends(require_token(TOKEN))])
    async def control() -> dict[str, bool]:
        return {"ok": True}

    return app


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(build(), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://demo") as client:
        yield client


async def test_an_invalid_body_names_each_field_and_what_it_got(http: httpx.AsyncClient) -> None:
    answer = await http.post(
        "/items", json={"messages": [{"role": "bot", "content": "x"}], "responses": ["r"], "extra": 1}
    )
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    fields = {e["field"]: e["detail"] for e in answer.json()["errors"]}
    assert set(fields) == {"messages.0.role", "extra"}
    assert "'bot'" in fields["messages.0.role"]
    assert "unknown key" in fields["extra"]


async def test_every_answer_carries_the_request_id_given_or_a_new_one(http: httpx.AsyncClient) -> None:
    assert (await http.get("/mismatch", headers={"X-Request-Id": "abc"})).headers["x-request-id"] == "abc"
    assert (await http.get("/mismatch", headers={"X-Request-Id": "abc"})).json()["instance"] == "abc"
    assert len((await http.get("/health/live")).headers["x-request-id"]) == 32


async def test_errors_of_ours_become_problems_with_their_status(http: httpx.AsyncClient) -> None:
    answer = await http.get("/mismatch")
    assert answer.status_code == 409
    assert answer.json()["code"] == "policy-mismatch"
    assert answer.json()["field"] == "policy_version"
    busy = await http.get("/busy")
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "2")


async def test_an_unexpected_error_tells_no_secret(http: httpx.AsyncClient) -> None:
    answer = await http.get("/crash")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["code"] == "internal"


async def test_unknown_routes_and_methods_are_problems_too(http: httpx.AsyncClient) -> None:
    assert (await http.get("/nowhere")).headers["content-type"] == "application/problem+json"
    assert (await http.get("/items")).json()["status"] == 405


async def test_a_control_route_needs_the_token(http: httpx.AsyncClient) -> None:
    assert (await http.put("/control")).status_code == 401
    assert (await http.put("/control", headers={"Authorization": "Bearer wrong"})).status_code == 401
    good = {"Authorization": f"Bearer {TOKEN.get_secret_value()}"}
    assert (await http.put("/control", headers=good)).json() == {"ok": True}
    assert (await http.put("/control")).headers["www-authenticate"] == "Bearer"


async def test_a_service_proves_that_it_knows_the_token_to_who_knows_it_too(http: httpx.AsyncClient) -> None:
    nonce = new_nonce()
    answer = await http.get("/health/identity", params={"nonce": nonce})
    assert answer.status_code == 200
    assert is_proven(TOKEN, "demo", nonce, answer.content)
    assert TOKEN.get_secret_value() not in answer.text
    assert not is_proven(SecretStr("another-token-of-enough"), "demo", nonce, answer.content)
    assert not is_proven(TOKEN, "reward", nonce, answer.content), "a service cannot stand in for another"
    assert not is_proven(TOKEN, "demo", new_nonce(), answer.content), "an old answer is no answer"


@pytest.mark.parametrize("nonce", ["", "0" * 31, "0" * 33, "g" * 32, "A" * 32, "0" * 31 + "\n", None])
async def test_a_service_proves_nothing_of_another_form_than_a_nonce(
    http: httpx.AsyncClient, nonce: str | None
) -> None:
    answer = await http.get("/health/identity", params={} if nonce is None else {"nonce": nonce})
    assert answer.status_code == 422
    assert answer.json()["field"] == "nonce"


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"service": "demo", "proof": "\xc3\xa9"}', b"\xff"])
def test_what_is_no_identity_proves_nothing(body: bytes) -> None:
    assert not is_proven(TOKEN, "demo", new_nonce(), body)


async def test_readiness_says_why_and_liveness_is_apart(http: httpx.AsyncClient) -> None:
    ready = await http.get("/health/ready")
    assert (ready.status_code, ready.json()["detail"]) == (503, "no policy is loaded")
    assert (await http.get("/health/live")).status_code == 200
    assert "ratchet_http_requests_total" in (await http.get("/metrics")).text


def client(handler: httpx.MockTransport, **options: bool) -> ServiceClient:
    return ServiceClient("reward", "http://reward", TOKEN, transport=handler, **options)


async def test_a_problem_is_raised_as_the_error_it_was(http: httpx.AsyncClient) -> None:
    error = error_from(await http.get("/mismatch"))
    assert type(error) is PolicyMismatch
    assert error.field == "policy_version"
    assert type(error_from(await http.get("/busy"))) is Overloaded
    assert error_from(await http.get("/busy")).retry_after_seconds == 2.0


async def test_a_4xx_is_not_sent_again() -> None:
    calls: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        calls.append(request.url.path)
        return httpx.Response(404, json=NotFound("no such run").problem().model_dump(mode="json"))

    with pytest.raises(NotFound, match="no such run"):
        await client(httpx.MockTransport(answer)).send("GET", "/v1/runs/x")
    assert calls == ["/v1/runs/x"]


async def test_an_answer_of_another_shape_names_the_service_and_not_the_caller_s_input() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json={"messages": []}))
    with pytest.raises(UpstreamFailed, match="GET /x with something that is no ScoreItem"):
        await client(transport).call("GET", "/x", answer=ScoreItem)


async def test_a_503_is_tried_again_until_it_passes() -> None:
    answers = [503, 502, 200]

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(answers.pop(0), json={})

    assert (await client(httpx.MockTransport(answer)).send("GET", "/x")).status_code == 200


async def test_a_refused_connection_is_tried_again_and_then_names_the_service() -> None:
    calls = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        raise httpx.ConnectError("refused", request=request)

    with pytest.raises(Unavailable, match="reward at http://reward cannot be reached"):
        await client(httpx.MockTransport(answer)).send("GET", "/x")
    assert calls == RETRY_ATTEMPTS


@pytest.mark.parametrize(
    ("raised", "expected"), [(httpx.ReadTimeout, DeadlineExceeded), (httpx.ReadError, ConnectionLost)]
)
async def test_a_request_that_may_have_taken_effect_is_not_repeated(
    raised: type[httpx.HTTPError], expected: type[Exception]
) -> None:
    calls = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        raise raised("broke")

    with pytest.raises(expected, match="reward"):
        await client(httpx.MockTransport(answer)).send("POST", "/x", timeout_seconds=0.5)
    assert calls == 1


async def test_an_answer_that_is_no_problem_is_still_told() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(418, text="short and stout"))
    with pytest.raises(RemoteError, match="418: short and stout"):
        await client(transport).send("GET", "/x")


def test_there_is_no_default_token_and_a_short_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RATCHET_TOKEN", raising=False)
    monkeypatch.setenv("RATCHET_STORE_URL", "x")
    with pytest.raises(ValidationError, match="token"):
        ServiceSettings()  # pyright: ignore[reportCallIssue]
    monkeypatch.setenv("RATCHET_TOKEN", "short")
    with pytest.raises(ValidationError, match="at least 16 characters"):
        ServiceSettings()  # pyright: ignore[reportCallIssue]
    monkeypatch.setenv("RATCHET_TOKEN", TOKEN.get_secret_value())
    assert TOKEN.get_secret_value() not in repr(ServiceSettings())  # pyright: ignore[reportCallIssue]


def test_an_item_without_responses_is_invalid() -> None:
    with pytest.raises(ValidationError):
        ScoreItem(messages=(Message(role="user", content="q"),), responses=())


def test_a_missing_variable_is_named_and_no_other_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RATCHET_TOKEN", TOKEN.get_secret_value())
    monkeypatch.delenv("RATCHET_STORE_URL", raising=False)
    with pytest.raises(ValidationError) as refused:
        ServiceSettings()  # pyright: ignore[reportCallIssue]
    assert TOKEN.get_secret_value() not in str(refused.value)
    monkeypatch.setenv("RATCHET_PORT", "99999")
    with pytest.raises(SystemExit) as ended:
        settings_from_environment(ServiceSettings)
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert "RATCHET_STORE_URL: is not set (Artifact store" in told
    assert "RATCHET_PORT: Input should be less than or equal to 65535" in told
    assert TOKEN.get_secret_value() not in told


async def test_a_made_up_method_makes_no_metric_series_of_its_own(http: httpx.AsyncClient) -> None:
    assert (await http.request("BREW", "/items")).status_code == 405
    metrics = (await http.get("/metrics")).text
    assert "BREW" not in metrics
    assert 'method="other"' in metrics
