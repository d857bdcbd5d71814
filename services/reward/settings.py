"""Settings of the reward service. Variables are prefixed `RATCHET_REWARD_`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from services.contracts.model import Name
from services.contracts.scores import ScorerSpec
from services.platform.settings import ServiceSettings

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores() -> int:
    """Cores this process may use: its affinity, and the container's CPU quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP_QUOTA.read_text().split()
        if quota != "max":
            cores = min(cores, int(quota) // int(period))
    except (OSError, ValueError):
        pass
    return max(1, cores)


class RewardSettings(ServiceSettings):
    """What the operator of a reward service can set."""

    reward_scorers: dict[Name, ScorerSpec] = Field(
        default_factory=dict,
        description='Loaded at start; JSON: {"default": {"kind": "bradley_terry", "checkpoint": "models/rm"}}.',
    )
    reward_device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU when there is one.")
    reward_dtype: Literal["stored", "float32", "bfloat16", "float16"] = Field(
        default="stored", description="dtype the models compute in; `stored` is that of their weights on disk."
    )
    reward_threads: int = Field(
        default_factory=available_cores,
        ge=1,
        description="CPU threads of one forward pass; default: the process's cores.",
    )
    reward_max_batch_tokens: int = Field(
        default=2048,
        ge=1,
        description="Padded tokens of one forward pass; a longer sequence goes alone. Small ones stay in a CPU's cache "
        "(measured: 1,024 to 4,096 are quickest); a GPU wants 32,768 or more.",
    )
    reward_max_batch_sequences: int = Field(default=256, ge=1, description="Sequences of one forward pass.")
    reward_max_queued_tokens: int = Field(
        default=4_000_000,
        ge=1,
        description="Tokens that may wait; more is refused with 429. Bounds memory and waiting.",
    )
    reward_stuck_seconds: float = Field(
        default=300.0, gt=0, description="A forward pass that takes longer is reported as stuck by /health/live."
    )
