"""Ids that follow work through the logs of all services: of a prompt in an iteration, of a job, of a request.

The shapes are those of W3C Trace Context (https://www.w3.org/TR/trace-context/), so that a caller's tracer and ours
name the same thing in the same way.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, NamedTuple

from pydantic import Field

TraceId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""32 lower-case hex digits."""

TRACE_ID = re.compile(r"[0-9a-f]{32}")
NO_TRACE = "0" * 32
NO_SPAN = "0" * 16
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_PLACE = re.compile(r"([^/]+)/(?:iter-(\d+)|rollback)/.+")


class JobPlace(NamedTuple):
    """Where a job of a run belongs."""

    run: str
    iteration: int | None
    """None: the job belongs to the run as a whole (a rollback)."""


class TraceParent(NamedTuple):
    """A caller's `traceparent`: the trace it is in, and its own span."""

    trace_id: str
    span_id: str
    flags: str


def prompt_trace_id(run: str, iteration: int, prompt_id: str) -> str:
    """The trace id of a prompt in an iteration of a run, from being drawn to its pair (or to being dropped).

    First 16 bytes of the SHA-256 of `{run}/iter-{iteration}/{prompt_id}`: derived, so that a repeated job logs and
    writes the same one, and anyone can compute it.
    """
    return derived_trace_id(f"{run}/iter-{iteration}/{prompt_id}")


def derived_trace_id(name: str) -> str:
    """The trace id of anything with a name, e.g. of a job by its id."""
    return hashlib.sha256(name.encode()).hexdigest()[:32]


def valid_trace_id(value: str) -> bool:
    """Whether this is a trace id: 32 lower-case hex digits, not all zero."""
    return bool(TRACE_ID.fullmatch(value)) and value != NO_TRACE


def parse_traceparent(header: str) -> TraceParent | None:
    """A `traceparent` header; None when it is malformed, which W3C says to treat as absent.

    A version above 00 may carry more fields; the first four are then read. Version ff is invalid.
    """
    match = _TRACEPARENT.fullmatch(header.strip())
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more is not None) or trace_id == NO_TRACE or span_id == NO_SPAN:
        return None
    return TraceParent(trace_id, span_id, flags)


def job_place(job_id: str) -> JobPlace | None:
    """Run and iteration of a run's job, from its id (`{run}/iter-{t}/…`, `{run}/rollback/…`); None for other jobs."""
    match = _PLACE.fullmatch(job_id)
    if match is None:
        return None
    return JobPlace(match[1], None if match[2] is None else int(match[2]))
