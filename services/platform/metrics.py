"""Prometheus metrics that every service has, and the scheme that all of Ratchet's metrics follow.

A name is `ratchet_<subsystem>_<what>_<unit>`, with `_total` behind it when it only ever grows.

- Subsystem: `generator`, `reward`, `trainer` and `orchestrator` for what only that service knows, in its `metrics.py`;
  `run` for figures of single runs; and here `build`, `service`, `http`, `jobs`, `events`, `redis` for what they share.
- Unit: base units only (`seconds`, `bytes`, `tokens`, `nats`; `ratio` for parts of one). Plain counts are named by
  what is counted (`_jobs_running`, `_requests_total`).
- Labels mean the same everywhere: `service`, `queue` and `kind` (of a job), `outcome` (how something ended), `reason`,
  `scorer`, `traffic` (`outside` or `rollouts`), `run`, `stage`. Their values come from a small closed set, with one
  exception: `run`, which only gauges of the latest runs carry and which is removed with them.
- A counter that an alert watches is there from the start with the value 0, for `increase()` cannot see a first 1.

vLLM's own metrics, passed on by the generator, keep their names (`vllm:…`).
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

DISTRIBUTION = "ratchet-rlhf"

disable_created_metrics()  # a `_created` series beside each counter, which nothing here reads

BUILD_INFO = Gauge("ratchet_build_info", "1, with the version of Ratchet as a label.", ["service", "version"])
SERVICE_READY = Gauge("ratchet_service_ready", "1 when /health/ready would say so at this scrape, else 0.", ["service"])

HTTP_REQUESTS = Counter("ratchet_http_requests_total", "Answered requests.", ["service", "method", "route", "status"])
HTTP_REQUEST_SECONDS = Histogram(
    "ratchet_http_request_seconds",
    "Time from request to end of the answer, streams included.",
    ["service", "method", "route"],
    buckets=(0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900),
)
HTTP_IN_FLIGHT = Gauge("ratchet_http_requests_in_flight", "Requests being answered, streams included.", ["service"])

JOBS_ENQUEUED = Counter("ratchet_jobs_enqueued_total", "New jobs that this process queued.", ["queue", "kind"])
JOB_ATTEMPTS = Counter(
    "ratchet_jobs_attempts_total",
    "Attempts at jobs in this process, by outcome: succeeded, failed, retried, cancelled, released, lost.",
    ["queue", "outcome"],
)
JOB_SECONDS = Histogram(
    "ratchet_jobs_attempt_seconds",
    "Time an attempt took, whatever came of it.",
    ["queue", "kind"],
    buckets=(0.1, 0.5, 1, 5, 15, 60, 300, 1800, 7200),
)
JOBS_RUNNING = Gauge("ratchet_jobs_running", "Jobs whose handler runs in this process now.", ["queue"])
JOBS_RETRIED = Counter(
    "ratchet_jobs_retries_total",
    "Jobs queued again, by reason: error (a retryable one, or a crash), lost (their worker was silent for a lease).",
    ["queue", "reason"],
)
JOBS_DEAD = Counter(
    "ratchet_jobs_dead_lettered_total",
    "Jobs that failed for good: not retryable, or all attempts used up. They wait for somebody to mend the cause.",
    ["queue"],
)
JOBS_WAITING = Gauge("ratchet_jobs_waiting", "Jobs in the queue that no worker has taken yet.", ["queue"])
JOBS_DELAYED = Gauge("ratchet_jobs_delayed", "Jobs that failed and wait for the time of their next attempt.", ["queue"])
JOBS_OLDEST = Gauge(
    "ratchet_jobs_oldest_waiting_seconds", "How long the oldest of the waiting jobs has waited; 0: none.", ["queue"]
)

EVENT_FOLLOWERS = Gauge("ratchet_events_followers", "Readers of event streams, live.")
EVENTS_PUBLISHED = Counter("ratchet_events_published_total", "Events published besides those of jobs.", ["kind"])

REDIS_REACHABLE = Gauge(
    "ratchet_redis_reachable", "1 while Redis answers this client, 0 while it does not.", ["client"]
)
REDIS_OUTAGES = Counter("ratchet_redis_outages_total", "Times that Redis stopped answering this client.", ["client"])


def announce(service: str, api_version: str) -> None:
    """Set `ratchet_build_info` of this process's service."""
    try:
        found = version(DISTRIBUTION)
    except PackageNotFoundError:
        found = api_version
    BUILD_INFO.labels(service, found).set(1)


def start_counters(queues: Iterable[str]) -> None:
    """Make the counters of these queues exist, at 0."""
    for queue in queues:
        JOBS_DEAD.labels(queue)
        JOBS_RUNNING.labels(queue)
        for reason in ("error", "lost"):
            JOBS_RETRIED.labels(queue, reason)
        for outcome in ("succeeded", "failed", "retried"):
            JOB_ATTEMPTS.labels(queue, outcome)
