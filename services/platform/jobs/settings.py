"""Numbers of the job queue. Every process that shares a queue should use the same ones."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from services.contracts.model import Contract


class JobSettings(Contract):
    """How long a lease lasts, how often it is renewed, and how much is remembered."""

    lease_seconds: float = Field(
        default=30.0, gt=0, description="A worker silent for this long is taken for dead, and its job given to another."
    )
    heartbeat_seconds: float = Field(
        default=2.0,
        gt=0,
        description="A running job's lease is renewed this often; so long, at most, until a cancel is seen.",
    )
    reclaim_seconds: float = Field(default=10.0, gt=0, description="How often a worker looks for leases that ran out.")
    block_seconds: float = Field(
        default=1.0,
        gt=0,
        le=5,
        description="An idle worker's read waits this long for work; so long until it sees a stop.",
    )
    event_interval_seconds: float = Field(
        default=0.5,
        gt=0,
        description="Progress events of one job are at least this far apart; figures between are merged.",
    )
    stall_seconds: float | None = Field(
        default=None,
        gt=0,
        description="A handler that reports no progress for this long is stopped and retried. None: never.",
    )
    cancel_grace_seconds: float = Field(
        default=5.0,
        ge=0,
        description="A handler told of a cancel has this long to clean up before its task is cancelled.",
    )
    stop_grace_seconds: float = Field(
        default=5.0,
        ge=0,
        description="At shutdown handlers have this long to end by themselves before their jobs go back.",
    )
    retry_base_seconds: float = Field(
        default=1.0, ge=0, description="Delay before the second attempt; doubled for each more."
    )
    retry_max_seconds: float = Field(default=60.0, ge=0, description="Longest delay that doubling reaches.")
    reconnect_max_seconds: float = Field(
        default=2.0, gt=0, description="While Redis is away a worker asks again at least this often."
    )
    events_kept: int = Field(default=10_000, ge=1, description="Events kept per topic, about; older ones are dropped.")
    inbox_kept: int = Field(
        default=10_000,
        ge=1,
        description="Messages kept in the inbox, about; the orchestrator's sweep makes up for dropped ones.",
    )
    key_prefix: str = Field(
        default="ratchet", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="First part of every key."
    )

    @model_validator(mode="after")
    def _lease_outlives_a_lost_heartbeat(self) -> Self:
        if self.heartbeat_seconds * 3 > self.lease_seconds:
            raise ValueError(
                f"heartbeat_seconds={self.heartbeat_seconds} must be at most a third of "
                f"lease_seconds={self.lease_seconds}, or one lost heartbeat loses the job; lower it or raise the lease"
            )
        return self

    def retry_delay_seconds(self, attempt: int) -> float:
        """Seconds to wait after attempt number `attempt` (from 1) failed: 1, 2, 4, … up to `retry_max_seconds`."""
        return min(self.retry_base_seconds * 2.0 ** max(0, attempt - 1), self.retry_max_seconds)


DEFAULT_SETTINGS = JobSettings()
