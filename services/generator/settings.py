"""Settings of the generator. Variables are prefixed `RATCHET_`, e.g. `RATCHET_GENERATOR_DTYPE`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from services.contracts.model import Name, StorePath
from services.platform.settings import ServiceSettings


class GeneratorSettings(ServiceSettings):
    """What the operator of a generator can set."""

    generator_policy: StorePath | None = Field(default=None, description="Checkpoint folder served from the start.")
    generator_model_name: Name = Field(default="policy", description="Model name of the OpenAI routes; never changes.")

    # --- the engine
    generator_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="dtype vLLM computes in. auto: vLLM's choice, bfloat16 for float32 checkpoints."
    )
    generator_max_model_len: int | None = Field(
        default=None, ge=8, description="Most tokens of prompt and response together; default: the model's own."
    )
    generator_kv_cache_gib: float | None = Field(
        default=1.0,
        gt=0,
        description="Memory of the KV cache, GiB. Unset (`null`): vLLM takes its share of the device.",
    )
    generator_enforce_eager: bool = Field(
        default=True, description="No graph capture: the quicker start on CPU. Set false on GPUs for speed."
    )
    generator_threads: int = Field(
        default_factory=lambda: max(1, len(os.sched_getaffinity(0)) // 2),
        ge=1,
        description="OpenMP threads of vLLM on CPU. They wait for each other spinning, so a core shared with another "
        "process slows them all (2 threads on 2 busy cores: 500 tokens/s, 1 thread: 5,500). Half the cores leaves room "
        "for the API server and the other services. With 1 the engine is forked and starts in half the time.",
    )
    generator_single_process: bool = Field(
        default=True,
        description="On CPU, run the model in the engine's process instead of a third one: a third less start-up time "
        "and 1 GB less memory.",
    )
    generator_engine_args: tuple[str, ...] = Field(
        default=(), description='More arguments of vLLM\'s API server, as a JSON list: ["--tensor-parallel-size", "2"].'
    )
    generator_engine_log: Path | None = Field(default=None, description="File for vLLM's log; default: our stdout.")
    generator_engine_command: tuple[str, ...] = Field(
        default=(),
        description="Program run instead of `python -m services.generator.vllm_server`, which runs vLLM's API server.",
    )

    # --- taking turns on one device
    generator_sleep: bool = Field(
        default=False,
        description="Give up the device while somebody leases it (`PUT /v1/device/lease`; the trainer does, with "
        "RATCHET_TRAINER_GENERATOR_URL). vLLM then runs with --enable-sleep-mode: its weights go to host memory, which "
        "must have room for them, and its KV cache is dropped. vLLM on CPU has no sleep mode: there a lease stops "
        "generation and frees the cores, but no memory.",
    )
    generator_sleep_seconds: float = Field(
        default=120.0, gt=0, description="Deadline of vLLM's falling asleep, and of its waking (16 GB take seconds)."
    )
    generator_lease_grace_seconds: float = Field(
        default=30.0,
        gt=0,
        description="With RATCHET_GENERATOR_SLEEP: a generator that starts waits this long for a holder to renew its "
        "lease before it starts vLLM, which would not fit beside the training. Above a third of the lease.",
    )

    # --- deadlines, seconds
    generator_start_seconds: float = Field(
        default=600.0, gt=0, description="vLLM must answer within it. On CPU 30 to 150 s were seen, nearly all imports."
    )
    generator_put_wait_seconds: float = Field(
        default=540.0,
        gt=0,
        description="PUT /v1/policy answers 202 with the state so far after it; asking again joins.",
    )
    generator_load_seconds: float = Field(default=300.0, gt=0, description="Loading weights in place (0.04 s for 1 M).")
    generator_proof_seconds: float = Field(default=120.0, gt=0, description="Computing the probes' log-probs.")
    generator_control_seconds: float = Field(default=30.0, gt=0, description="Pause, resume, cache reset, tokenize.")
    generator_stop_seconds: float = Field(default=5.0, gt=0, description="vLLM gets it to end by itself, then SIGKILL.")
    generator_drain_seconds: float = Field(
        default=0.5,
        ge=0,
        description="A swap lets outside requests finish for this long; then those that have sent nothing yet are "
        "taken back and sent again to the new policy.",
    )
    generator_stream_drain_seconds: float = Field(
        default=60.0,
        ge=0,
        description="Streams that have begun can only finish with the old policy: a swap waits this long, then ends "
        "them with an error.",
    )
    generator_rollout_wait_seconds: float = Field(
        default=60.0, ge=0, description="A swap waits this long for running rollouts, then is refused (retryable)."
    )
    generator_gate_wait_seconds: float = Field(
        default=120.0, gt=0, description="A request waits this long for a swap to end, then 503."
    )
    generator_trial_wait_seconds: float = Field(
        default=300.0, gt=0, description="An outside request waits this long for a trial to end, then 503."
    )
    generator_response_seconds: float = Field(
        default=600.0, gt=0, description="Longest silence of vLLM on a generation; then the request fails."
    )

    # --- limits
    generator_max_outside_requests: int = Field(default=512, ge=1, description="Waiting and running; above it 429.")
    generator_max_rollout_requests: int = Field(
        default=8, ge=1, description="POST /v1/rollouts at a time; above it 429."
    )
    generator_rollout_concurrency: int = Field(
        default=64, ge=1, description="Sampling groups sent to vLLM at a time, over all rollouts. vLLM batches them."
    )

    # --- watching
    generator_health_interval_seconds: float = Field(default=2.0, gt=0)
    generator_health_deadline_seconds: float = Field(default=5.0, gt=0, description="Of one health check of vLLM.")
    generator_health_failures: int = Field(
        default=4,
        ge=1,
        description="Missed checks in a row before a silent vLLM is killed (unready from the first one).",
    )
    generator_max_restarts: int = Field(default=4, ge=0, description="Starts in a row without a proof, then `failed`.")
    generator_restart_backoff_seconds: float = Field(default=1.0, ge=0, description="Doubled with each failed restart.")

    # --- proof: deviation of the served log-probs from the manifest's, nats
    generator_tolerance_float32: tuple[float, float] = Field(
        default=(0.002, 0.02), description="Mean and largest deviation allowed in float32 (measured: 1e-6 and 1e-5)."
    )
    generator_tolerance_float16: tuple[float, float] = Field(default=(0.02, 0.25), description="Same in float16.")
    generator_tolerance_bfloat16: tuple[float, float] = Field(
        default=(0.05, 0.5),
        description="Same in bfloat16 (measured: 0.01 and 0.05; a broken swap: 0.2 and 0.66 or more).",
    )
