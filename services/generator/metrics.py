"""Prometheus metrics of the generator."""

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
RESENT = Counter("ratchet_generator_requests_resent_total", "Requests taken back by a swap and sent again.")
ROLLOUT_TOKENS = Counter("ratchet_generator_rollout_tokens_total", "Tokens generated for rollouts.")
ROLLOUT_PROMPTS = Counter("ratchet_generator_rollout_prompts_total", "Prompts of rollouts.", ["outcome"])
READY = Gauge("ratchet_generator_ready", "1 while a proven policy is served.")
