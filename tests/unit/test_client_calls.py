"""The client over a fake transport that speaks the services' protocol."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from ratchet.client import Connection, RatchetClient
from services.contracts.browsing import PairQuery
from services.contracts.errors import Conflict, InvalidInput, JobFailed, NotFound, Unauthorized
from services.contracts.judgements import Verdict
from services.platform.http import ServiceClient

Handler = Callable[[httpx.Request], httpx.Response]
Make = Callable[[Handler], RatchetClient]
SSE = {"content-type": "text/event-stream"}
JOB = {
    "id": "train/sft/a", "queue": "train", "kind": "sft", "payload": {}, "topic": "t", "max_attempts": 4,
    "state": "running", "enqueued_at": 0.0,
}  # fmt: skip


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    clients: list[RatchetClient] = []

    def build(handler: Handler) -> RatchetClient:
        def service(self: Connection, name: str) -> ServiceClient:
            transport = httpx.MockTransport(handler)
            return ServiceClient(name, f"http://{name}", self.token, retry=False, transport=transport)

        monkeypatch.setattr(Connection, "service", service)
        monkeypatch.setattr("ratchet.client.asynchronous.POLL_SECONDS", 0.0)
        clients.append(RatchetClient.of(Connection(token=SecretStr("t" * 16))))
        return clients[-1]

    yield build
    for client in clients:
        client.close()


def test_a_problem_is_raised_as_the_service_raised_it(make: Make) -> None:
    problem = Conflict("run 'r' exists with another recipe", field="id").problem()
    client = make(lambda request: httpx.Response(409, content=problem.model_dump_json()))
    with pytest.raises(Conflict, match="another recipe") as raised:
        client.run("r")
    assert raised.value.field == "id"


def test_events_go_on_after_the_last_one_when_the_connection_ends(make: Make) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers["last-event-id"])
        if len(asked) == 2:
            raise httpx.ConnectError("restarting")
        number = len(asked)
        event = {"id": f"{number}-0", "at": 0.0, "type": "job.progress", "topic": "r"}
        return httpx.Response(
            200, headers=SSE, text=f": keep-alive\n\nid: {number}-0\nevent: job.progress\ndata: {json.dumps(event)}\n\n"
        )

    events = make(answer).events("r")
    assert [next(events).id, next(events).id] == ["1-0", "3-0"]
    events.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert asked == ["0", "1-0", "1-0"]


def test_waiting_for_a_job_reports_progress_over_an_outage_and_raises_its_cause(make: Make) -> None:
    progress = {"phase": "training", "step": 1, "total_steps": 2}
    problem = {"title": "x", "status": 422, "detail": "data: row 3 is empty"}
    answers: list[object] = [
        {**JOB, "state": "queued"}, {**JOB, "progress": progress}, httpx.ConnectError("gone"),
        {**JOB, "progress": progress}, {**JOB, "state": "failed", "problem": problem},
    ]  # fmt: skip

    def answer(request: httpx.Request) -> httpx.Response:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return httpx.Response(200, json=found)

    seen: list[tuple[str, int | None]] = []
    with pytest.raises(JobFailed, match="row 3 is empty"):
        make(answer).wait_job("train/sft/a", lambda job, p: seen.append((job.state.value, p.step if p else None)))
    assert seen == [("queued", None), ("running", 1), ("failed", None)]


def test_a_query_of_pairs_is_sent_as_it_is_meant(make: Make) -> None:
    asked: list[httpx.URL] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url)
        return httpx.Response(200, json={"total": 0, "offset": 0, "rows": [], "numbers": []})

    client = make(answer)
    client.pairs("r", 2, offset=50)
    client.pairs("r", 2, query=PairQuery(sort="margin", descending=True, search="a&b", min_margin=0.5))
    assert [url.path for url in asked] == ["/v1/runs/r/iterations/2/pairs"] * 2
    assert dict(asked[0].params) == {"sort": "row", "descending": "false", "offset": "50", "limit": "50"}
    assert dict(asked[1].params) == {
        "sort": "margin", "descending": "true", "search": "a&b", "min_margin": "0.5", "offset": "0", "limit": "50",
    }  # fmt: skip


def test_a_verdict_is_put_under_the_judge_s_name(make: Make) -> None:
    verdict = Verdict(win_rate=0.625, prompts=200)

    def answer(request: httpx.Request) -> httpx.Response:
        assert (request.method, request.url.path) == ("PUT", "/v1/runs/r/iterations/2/judgements/gold")
        assert request.headers["authorization"] == f"Bearer {'t' * 16}"
        assert Verdict.model_validate_json(request.content) == verdict
        return httpx.Response(
            200, json={"judge": "gold", "verdict": verdict.model_dump(), "judged_at": "2026-11-24T00:00:00+00:00"}
        )

    assert make(answer).judge("r", 2, "gold", verdict).verdict == verdict


def test_services_and_the_events_of_all_runs_come_from_the_orchestrator(make: Make) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.host == "orchestrator"
        if request.url.path == "/v1/services":
            return httpx.Response(200, json=[{"name": "redis", "url": "redis://h:1", "state": "ready"}])
        assert request.url.path == "/v1/events"
        event = {"id": "7-0", "at": 0.0, "type": "run.status", "topic": "runs", "data": {"run": "r"}}
        return httpx.Response(200, headers=SSE, text=f"id: 7-0\nevent: run.status\ndata: {json.dumps(event)}\n\n")

    client = make(answer)
    assert [one.state for one in client.services()] == ["ready"]
    events = client.all_events("6-0")
    assert next(events).data == {"run": "r"}
    events.close()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_streamed_answer_comes_in_pieces(make: Make) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/policy":
            return httpx.Response(200, json={"state": "serving", "model": "policy"})
        assert json.loads(request.content) == {
            "model": "policy", "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 5
        }  # fmt: skip
        pieces = [json.dumps({"choices": [{"delta": {"content": piece}}]}) for piece in ("a", "b")]
        return httpx.Response(200, headers=SSE, text="".join(f"data: {piece}\n\n" for piece in [*pieces, "[DONE]"]))

    assert list(make(answer).stream("hi", max_tokens=5)) == ["a", "b"]


def test_a_control_call_without_a_token_is_told_before_it_is_sent() -> None:
    with RatchetClient("http://127.0.0.1:1") as client, pytest.raises(Unauthorized, match="set RATCHET_TOKEN"):
        client.trigger("r")


def test_a_file_of_an_unknown_format_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("x")
    with RatchetClient("http://127.0.0.1:1") as client, pytest.raises(InvalidInput, match=r"\.jsonl"):
        client.upload_dataset(file)


def test_the_environment_names_the_services(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="ratchet up"):
        Connection.find(tmp_path)
    monkeypatch.setenv("RATCHET_URL", "http://o")
    assert Connection.find(tmp_path).orchestrator == "http://o"
    monkeypatch.setenv("RATCHET_URL", "o:80")
    with pytest.raises(InvalidInput, match="starts with http"):
        Connection.find(tmp_path)
