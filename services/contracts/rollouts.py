"""Sampling: what is asked of the policy, and what it answered."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from services.contracts.conversations import Message, Prompt
from services.contracts.model import Contract, TokenIds
from services.contracts.problems import Problem
from services.contracts.tracing import TraceId

FinishReason = Literal["stop", "length"]


class SamplingGroup(Contract):
    """`n` responses at one temperature. The paper takes half at 1.0 and half at 0.7."""

    n: int = Field(ge=1, le=1024, description="Responses per prompt; those of all groups make the prompt's n.")
    temperature: float = Field(ge=0.0, le=10.0, description="0: greedy, so all n are the same.")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="Nucleus sampling; 1: off.")


class Sampling(Contract):
    """How to sample the responses of each prompt. A prompt's n is the sum over the groups."""

    groups: tuple[SamplingGroup, ...] = Field(min_length=1)
    max_tokens: int = Field(ge=1, description="Most new tokens of a response.")

    @property
    def n(self) -> int:
        """Responses per prompt."""
        return sum(group.n for group in self.groups)


class RolloutRequest(Contract):
    """Body of `POST /v1/rollouts`. Refused with 409 `policy-mismatch` unless exactly `policy_version` is served."""

    policy_version: str
    prompts: tuple[Prompt, ...] = Field(min_length=1)
    sampling: Sampling
    seed: int = Field(
        ge=0, lt=2**31, description="Seeds of the single requests are derived from it and the prompt's id."
    )

    @model_validator(mode="after")
    def _unique_ids(self) -> Self:
        seen: set[str] = set()
        for prompt in self.prompts:
            if prompt.id in seen:
                raise ValueError(f"prompt id {prompt.id!r} occurs twice; ids must be unique in a request")
            seen.add(prompt.id)
        return self


class Response(Contract):
    """One sampled response."""

    text: str
    token_ids: TokenIds = Field(description="Exactly the sampled ids, with the end token when finish_reason is `stop`.")
    logprob: float = Field(
        description="Sum of the sampled tokens' log-probs under the policy at temperature 1, in nats."
    )
    finish_reason: FinishReason
    temperature: float
    top_p: float
    seed: int = Field(description="Seed of the request this response came from.")
    index: int = Field(description="Index of this response within that request.")


class Rollout(Contract):
    """One prompt with all its responses, all from one policy version."""

    prompt_id: str
    messages: tuple[Message, ...]
    prompt_token_ids: TokenIds
    responses: tuple[Response, ...]
    policy_version: str
    trace_id: TraceId | None = Field(default=None, description="The prompt's, as it was sent.")


class RolloutFailure(Contract):
    """A prompt that could not be answered, with the reason. It does not spoil the other prompts."""

    prompt_id: str
    problem: Problem


class RolloutLine(Contract):
    """One line of the NDJSON answer of `POST /v1/rollouts`: exactly one of the two is set."""

    rollout: Rollout | None = None
    failure: RolloutFailure | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.rollout is None) == (self.failure is None):
            raise ValueError("a line carries either a rollout or a failure")
        return self
