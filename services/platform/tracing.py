"""The trace that the present task works in: taken from a request or a job, passed on with every call it makes."""

from __future__ import annotations

import secrets
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from services.contracts.tracing import derived_trace_id, parse_traceparent, valid_trace_id
from services.platform.logs import log_context

MAX_REQUEST_ID_CHARACTERS = 100
MAX_TRACESTATE_CHARACTERS = 512
"""What W3C asks everyone to pass on; a longer one may be dropped."""
SAMPLED = "01"


@dataclass(frozen=True)
class Trace:
    """What is passed on: the trace's id, the request's id, and the caller's `tracestate` and flags as they came."""

    trace_id: str
    request_id: str
    flags: str = SAMPLED
    tracestate: str | None = None

    def headers(self) -> dict[str, str]:
        """Headers of a call made in this trace; each call is a span of its own."""
        found = {
            "traceparent": f"00-{self.trace_id}-{secrets.token_hex(8)}-{self.flags}",
            "X-Request-Id": self.request_id,
        }
        return found if self.tracestate is None else {**found, "tracestate": self.tracestate}


_CURRENT: ContextVar[Trace | None] = ContextVar("ratchet_trace", default=None)


def current_trace() -> Trace | None:
    """The trace of the present task; None outside requests and jobs."""
    return _CURRENT.get()


def trace_of_request(headers: Mapping[bytes, bytes]) -> Trace:
    """The trace of an incoming request, from its ASGI headers.

    `traceparent` gives the trace id; a malformed one is ignored, with its `tracestate` (W3C Trace Context, 3.2.2.3).
    Without it a request id that is a trace id in shape is taken as one, and any other gets a new trace beside it.
    """
    given = _printable(headers.get(b"x-request-id", b""))[:MAX_REQUEST_ID_CHARACTERS]
    parent = parse_traceparent(headers.get(b"traceparent", b"").decode("latin-1"))
    if parent is not None:
        state = _printable(headers.get(b"tracestate", b""))
        kept = state if 0 < len(state) <= MAX_TRACESTATE_CHARACTERS else None
        return Trace(parent.trace_id, given or secrets.token_hex(16), parent.flags, kept)
    request_id = given or secrets.token_hex(16)
    return Trace(request_id if valid_trace_id(request_id) else secrets.token_hex(16), request_id)


def _printable(value: bytes) -> str:
    """A header's value without what could not be sent on in another header."""
    return "".join(chr(byte) for byte in value if 0x20 <= byte < 0x7F).strip()


def trace_of_job(job_id: str) -> Trace:
    """The trace of a job: the requests it makes carry its id as theirs, and a trace id derived from it."""
    return Trace(derived_trace_id(job_id), job_id[:MAX_REQUEST_ID_CHARACTERS])


@contextmanager
def traced(trace: Trace) -> Generator[None]:
    """Work in this trace: its ids are on every line logged inside, and on every call of a `ServiceClient`."""
    token = _CURRENT.set(trace)
    try:
        with log_context(request_id=trace.request_id, trace_id=trace.trace_id):
            yield
    finally:
        _CURRENT.reset(token)
