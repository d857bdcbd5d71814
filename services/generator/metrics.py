"""Prometheus metrics of the generator; the naming scheme is in `services.platform.metrics`.

vLLM's own (`vllm:…`) are passed on beside them, see `engine_metrics`.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

SWAPS = Counter("ratchet_generator_swaps_total", "Swaps by outcome.", ["outcome"])
SWAP_SECONDS = Histogram(
    "ratchet_generator_swap_seconds",
    "Gate closed until gate open.",
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120),
)
ENGINE_STARTS = Counter("ratchet_generator_engine_starts_total", "Started vLLM processes.")
ENGINE_START_SECONDS = Histogram(
    "ratchet_generator_engine_start_seconds",
    "Start of vLLM until proven.",
    buckets=(5, 10, 20, 30, 45, 60, 90, 120, 180, 300, 600),
)
ENGINE_DEATHS = Counter("ratchet_generator_engine_deaths_total", "vLLM processes that ended unasked.")
IN_FLIGHT = Gauge("ratchet_generator_requests_in_flight", "Requests past the gate.", ["traffic"])
WAITING = Gauge(
    "ratchet_generator_requests_waiting", "Requests that wait at the gate for a swap or a trial.", ["traffic"]
)
GATE_WAIT_SECONDS = Histogram(
    "ratchet_generator_gate_wait_seconds",
    "Time at the gate of requests that found it closed, whether it opened for them or not.",
    ["traffic"],
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300),
)
REFUSED = Counter(
    "ratchet_generator_requests_refused_total",
    "Requests refused at the gate, by reason: too_many, shut (nothing is served), timeout (waited too long).",
    ["traffic", "reason"],
)
RESENT = Counter("ratchet_generator_requests_resent_total", "Requests taken back by a swap and sent again.")
ROLLOUT_TOKENS = Counter("ratchet_generator_rollout_tokens_total", "Tokens generated for rollouts.")
ROLLOUT_PROMPTS = Counter(
    "ratchet_generator_rollout_prompts_total", "Prompts of rollouts by outcome: done, retryable, failed.", ["outcome"]
)
ROLLOUT_PROMPT_SECONDS = Histogram(
    "ratchet_generator_rollout_prompt_seconds",
    "Time of a prompt of a rollout with all its responses, waiting for a slot included.",
    buckets=(0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
)
PROOF_DEVIATION = Gauge(
    "ratchet_generator_proof_deviation_nats",
    "Largest deviation of the served log-probs from the manifest's, at the last proof that passed.",
)
READY = Gauge("ratchet_generator_ready", "1 while a proven policy is served.")
ASLEEP = Gauge("ratchet_generator_asleep", "1 while somebody else holds the device and vLLM sleeps.")
LEASES = Counter("ratchet_generator_leases_total", "Leases on the device by outcome.", ["outcome"])
LEASE_SECONDS = Histogram(
    "ratchet_generator_lease_seconds",
    "Device given up until taken back.",
    buckets=(1, 5, 15, 30, 60, 300, 900, 1800, 3600, 7200, 14400),
)
WAKE_SECONDS = Histogram(
    "ratchet_generator_wake_seconds",
    "Device taken back until a proven policy is served.",
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300),
)

for _outcome in ("done", "failed"):
    SWAPS.labels(_outcome)
