"""What a judge outside the loop says of an iteration's policy: a gold judge, a person, a larger model."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from services.contracts.model import Contract, Name


class Verdict(Contract):
    """Body of `PUT /v1/runs/{id}/iterations/{t}/judgements/{judge}`: how often the iteration's policy wins.

    Never read by the loop: what the gate decides on is the proxy reward alone.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    win_rate: float = Field(ge=0.0, le=1.0, description="Share of comparisons won, ties counted half.")
    against: Literal["reference", "incumbent"] = Field(default="reference", description="Whom it was compared with.")
    low: float | None = Field(default=None, ge=0.0, le=1.0, description="Lower end of the 95 % interval.")
    high: float | None = Field(default=None, ge=0.0, le=1.0)
    prompts: int = Field(ge=1, description="Prompts that were judged.")
    score: float | None = Field(default=None, description="The judge's mean score of the policy, in its own unit.")

    @model_validator(mode="after")
    def _interval(self) -> Self:
        if self.low is not None and self.high is not None and not self.low <= self.high:
            raise ValueError(f"low ({self.low}) must not be above high ({self.high})")
        return self


class Judgement(Contract):
    """`runs/{run}/iter-{t}/judgements/{judge}.json`, written once."""

    judge: Name = Field(description="Who judged: `gold`, the name of a model, …")
    verdict: Verdict
    judged_at: str
