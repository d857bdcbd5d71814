"""Prometheus metrics of the reward service; the naming scheme is in `services.platform.metrics`."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

RESPONSES = Counter("ratchet_reward_responses_scored_total", "Responses scored.", ["scorer"])
ERRORS = Counter(
    "ratchet_reward_errors_total",
    "Requests that a scorer failed on, by the problem's code (internal: it crashed).",
    ["scorer", "reason"],
)
INVALID = Counter(
    "ratchet_reward_invalid_scores_total", "Requests whose scores were missing, NaN or infinite.", ["scorer"]
)
REFUSED = Counter("ratchet_reward_requests_refused_total", "Requests refused because the queue was full.")
BATCH_SECONDS = Histogram(
    "ratchet_reward_batch_seconds",
    "Time of one forward pass.",
    ["scorer"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
BATCH_SEQUENCES = Histogram(
    "ratchet_reward_batch_sequences",
    "Sequences of one forward pass.",
    ["scorer"],
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
)
BATCH_SPLITS = Counter(
    "ratchet_reward_batch_splits_total", "Batches that failed and were tried again in halves.", ["scorer"]
)
TOKENS = Counter(
    "ratchet_reward_batch_tokens_total",
    "Tokens computed, by kind: text, or padding, whose share is waste.",
    ["scorer", "kind"],
)
QUEUE_SECONDS = Histogram(
    "ratchet_reward_queue_seconds",
    "Time from a request's entering the queue to its last value.",
    ["scorer"],
    buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
QUEUED_SEQUENCES = Gauge("ratchet_reward_queue_sequences", "Sequences waiting for a batch.")
QUEUED_TOKENS = Gauge("ratchet_reward_queue_tokens", "Tokens waiting for a batch.")
SCORERS = Gauge("ratchet_reward_scorers", "Scorers that serve.")
LOADS = Counter("ratchet_reward_scorer_loads_total", "Loads of scorers by outcome: done, refused.", ["outcome"])
LOAD_SECONDS = Histogram(
    "ratchet_reward_scorer_load_seconds",
    "Time to load and prove a scorer.",
    buckets=(0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
)

for _outcome in ("done", "refused"):
    LOADS.labels(_outcome)
