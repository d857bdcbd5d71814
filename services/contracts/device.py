"""Taking turns on one device: the trainer leases it, and the generator's engine sleeps meanwhile."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from services.contracts.model import Contract

Holder = Annotated[str, Field(min_length=1, max_length=400, pattern=r"^[^\x00-\x1f]+$")]
"""Who holds a lease, in words for an operator: `trainer-host-7 for run/iter-1/train`. Equal words are one holder."""

LEASE_RENEWALS = 3
"""A holder renews its lease after this part of it, so that two renewals may get lost."""


class LeaseRequest(Contract):
    """Body of `PUT /v1/device/lease`: take the device, or renew the lease on it."""

    holder: Holder
    seconds: float = Field(gt=0, le=3600, description="From now; not renewed by then, the generator wakes by itself.")


class DeviceLease(Contract):
    """A lease on the generator's device, as the generator sees it."""

    id: str = Field(description="New with each grant: a holder that sees another id lost its lease in between.")
    holder: Holder
    seconds_left: float
    engine: Literal["draining", "asleep", "idle", "absent"] = Field(
        description="What vLLM does meanwhile. draining: it still answers what had begun; the device is not free yet. "
        "asleep: its weights are in host memory, its KV cache is dropped. idle: this vLLM has no sleep mode (CPU): its "
        "memory stays, only the cores are free. absent: no vLLM runs."
    )
