"""How the services are, as the orchestrator sees them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from services.contracts.model import Contract


class ServiceHealth(Contract):
    """One service of `GET /v1/services`."""

    name: Literal["orchestrator", "generator", "reward", "trainer", "redis", "store"]
    url: str | None = Field(description="Where it was asked; never with a password.")
    state: Literal["ready", "not_ready", "unreachable"]
    detail: str | None = Field(default=None, description="Why it is not ready, in its own words.")
    serving: tuple[str, ...] = Field(
        default=(), description="Policy version (generator), loaded scorers as `name: revision` (reward)."
    )
    seconds: float | None = Field(default=None, description="How long the answer took.")
