"""Trace and request ids: derived for prompts and jobs, taken from callers as W3C says, passed on by every call."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from services.contracts.conversations import Message, Prompt
from services.contracts.rollouts import RolloutRequest, Sampling, SamplingGroup
from services.contracts.tracing import (
    JobPlace,
    TraceParent,
    derived_trace_id,
    job_place,
    parse_traceparent,
    prompt_trace_id,
    valid_trace_id,
)
from services.platform.http import ServiceClient
from services.platform.logs import get_logger
from services.platform.service import create_service
from services.platform.tracing import current_trace, trace_of_job, traced
from tests.fixtures.logs import JsonLogs, json_logs

__all__ = ["json_logs"]
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"
log = get_logger(__name__)


def test_a_prompt_s_trace_id_is_derived_from_run_iteration_and_prompt() -> None:
    # printf 'my-run/iter-1/0a1b2c3d4e5f6071' | sha256sum | cut -c1-32
    assert prompt_trace_id("my-run", 1, "0a1b2c3d4e5f6071") == "f8655b0857f48e076938c8bc4b8cc6ee"
    assert valid_trace_id(prompt_trace_id("r", 1, "p"))
    assert len({prompt_trace_id(run, t, p) for run in ("a", "b") for t in (1, 2) for p in ("x", "y")}) == 8
    with pytest.raises(ValueError, match="trace_id"):
        Prompt(id="p", messages=(Message(role="user", content="q"),), trace_id="not-hex")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (GOOD, TraceParent(TRACE, SPAN, "01")),
        (f" {GOOD} ", TraceParent(TRACE, SPAN, "01")),
        (f"cc-{TRACE}-{SPAN}-00-what-comes-later", TraceParent(TRACE, SPAN, "00")),  # a later version may add fields
        (f"{GOOD}-more", None),  # version 00 may not
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"00-{TRACE[:-1]}-{SPAN}-01", None),
        (f"00-{TRACE}-{SPAN}", None),
        (f"00-{TRACE}-{SPAN}-01\n{GOOD}", None),
        ("", None),
    ],
)
def test_a_malformed_traceparent_counts_as_none(header: str, expected: TraceParent | None) -> None:
    assert parse_traceparent(header) == expected


@pytest.mark.parametrize(
    ("job_id", "place"),
    [
        ("my-run/iter-12/sample/00003", JobPlace("my-run", 12)),
        ("my-run/iter-0/decide", JobPlace("my-run", 0)),
        ("my-run/rollback/00000", JobPlace("my-run", None)),
        ("train/dpo/0a1b", None),
        ("x", None),
    ],
)
def test_a_job_s_id_says_to_which_run_and_iteration_it_belongs(job_id: str, place: JobPlace | None) -> None:
    assert job_place(job_id) == place


def build(seen: list[dict[str, Any]]) -> FastAPI:
    app = create_service("demo", title="Demo", version="1")

    @app.get("/ids")
    async def ids() -> dict[str, str]:
        log.info("asked")
        trace = current_trace()
        assert trace is not None
        async with _called(seen) as client:
            await client.send("GET", "/next")
        return {"trace_id": trace.trace_id, "request_id": trace.request_id}

    return app


class _called:
    """A client of a service that notes the headers it gets."""

    def __init__(self, seen: list[dict[str, Any]]) -> None:
        def answer(request: httpx.Request) -> httpx.Response:
            seen.append(dict(request.headers))
            return httpx.Response(200, json={})

        self.client = ServiceClient("next", "http://next", transport=httpx.MockTransport(answer))

    async def __aenter__(self) -> ServiceClient:
        return self.client

    async def __aexit__(self, *ended: object) -> None:
        await self.client.close()


@pytest.fixture
def seen() -> list[dict[str, Any]]:
    return []


@pytest.fixture
async def http(seen: list[dict[str, Any]]) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(build(seen))
    async with httpx.AsyncClient(transport=transport, base_url="http://demo") as client:
        yield client


async def test_a_caller_s_trace_is_logged_and_passed_on(
    http: httpx.AsyncClient, seen: list[dict[str, Any]], json_logs: JsonLogs
) -> None:
    headers = {"traceparent": GOOD, "tracestate": "vendor=1", "X-Request-Id": "abc"}
    answer = await http.get("/ids", headers=headers)
    assert answer.json() == {"trace_id": TRACE, "request_id": "abc"}
    (line,) = [line for line in json_logs.lines() if line["event"] == "asked"]
    assert (line["trace_id"], line["request_id"], line["level"]) == (TRACE, "abc", "info")
    (sent,) = seen
    passed = parse_traceparent(sent["traceparent"])
    assert passed is not None
    assert (passed.trace_id, passed.flags, sent["tracestate"], sent["x-request-id"]) == (TRACE, "01", "vendor=1", "abc")
    assert passed.span_id != SPAN, "a call is a span of its own"


@pytest.mark.parametrize("header", ["nonsense", f"00-{'0' * 32}-{SPAN}-01", f"{GOOD},{GOOD}"])
async def test_a_bad_traceparent_is_ignored_with_its_tracestate(
    http: httpx.AsyncClient, seen: list[dict[str, Any]], header: str
) -> None:
    answer = await http.get("/ids", headers={"traceparent": header, "tracestate": "vendor=1", "X-Request-Id": "abc"})
    assert answer.status_code == 200
    assert answer.json()["request_id"] == "abc"
    assert answer.json()["trace_id"] not in (TRACE, "0" * 32)
    assert valid_trace_id(answer.json()["trace_id"])
    assert "tracestate" not in seen[0]


async def test_a_request_id_in_the_shape_of_a_trace_id_is_one(http: httpx.AsyncClient) -> None:
    assert (await http.get("/ids", headers={"X-Request-Id": TRACE})).json() == {"trace_id": TRACE, "request_id": TRACE}
    one = (await http.get("/ids")).json()
    assert one["trace_id"] == one["request_id"]
    assert one != (await http.get("/ids")).json()


async def test_a_request_id_that_no_header_can_carry_on_breaks_nothing(
    http: httpx.AsyncClient, seen: list[dict[str, Any]]
) -> None:
    answer = await http.get("/ids", headers={b"X-Request-Id": "caf\u00e9\t1".encode("latin-1")})
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == seen[0]["x-request-id"] == "caf1"
    assert (await http.get("/ids", headers={"X-Request-Id": "x" * 500})).json()["request_id"] == "x" * 100


async def test_calls_of_a_job_carry_the_job_s_id(seen: list[dict[str, Any]], json_logs: JsonLogs) -> None:
    job = "r/iter-1/score/00002"
    async with _called(seen) as client:
        with traced(trace_of_job(job)):
            log.info("working")
            await client.send("GET", "/next")
        await client.send("GET", "/next")
    assert seen[0]["x-request-id"] == job
    assert seen[0]["traceparent"].split("-")[1] == derived_trace_id(job)
    assert "traceparent" not in seen[1]
    assert re.fullmatch(r"[0-9a-f]{32}", json_logs.lines()[0]["trace_id"])


def test_prompts_without_a_trace_id_are_still_accepted() -> None:
    body = {
        "policy_version": "v", "seed": 1, "prompts": [{"id": "p", "messages": [{"role": "user", "content": "q"}]}],
        "sampling": Sampling(groups=(SamplingGroup(n=1, temperature=1.0),), max_tokens=8).model_dump(),
    }  # fmt: skip
    assert RolloutRequest.model_validate(body).prompts[0].trace_id is None
