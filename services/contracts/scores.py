"""Scoring: prompts with their responses in, raw rewards out."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from services.contracts.conversations import Message
from services.contracts.model import Contract, Name, StorePath, TokenIds
from services.contracts.tracing import TraceId

ScorerKind = Literal["bradley_terry", "logprob"]
"""`bradley_terry`: sequence classifier with one label. `logprob`: a policy that gives log-probs (the KL reference)."""


class ScoreItem(Contract):
    """A prompt and its n responses. They travel together, so that the prompt is computed once."""

    messages: tuple[Message, ...] = Field(min_length=1)
    responses: tuple[str, ...] = Field(min_length=1)
    allow_empty: bool = Field(
        default=False,
        description="Score an empty response too: a policy may end its turn at once. Else it is refused.",
    )
    trace_id: TraceId | None = Field(
        default=None, description="Logged with the item's scores; default: that of the request (`traceparent`)."
    )


class ScoreRequest(Contract):
    """Body of `POST /v1/score`."""

    scorer: Name = Field(default="default")
    revision: str | None = Field(default=None, description="If given, any other loaded revision is refused with 409.")
    items: tuple[ScoreItem, ...] = Field(min_length=1)


class ScoreResponse(Contract):
    """Raw logits, `[items][responses]`, never squashed or clipped."""

    scorer: str
    revision: str
    template_hash: str = Field(description="Hash of chat template, special-token and truncation rules used.")
    scores: tuple[tuple[float, ...], ...]


class LogprobItem(Contract):
    """Exact token ids of a prompt and its responses."""

    prompt_token_ids: TokenIds = Field(min_length=1)
    response_token_ids: tuple[TokenIds, ...] = Field(min_length=1)


class LogprobRequest(Contract):
    """Body of `POST /v1/logprobs`, answered by a scorer of kind `logprob`."""

    scorer: Name = Field(default="reference")
    revision: str | None = None
    items: tuple[LogprobItem, ...] = Field(min_length=1)


class LogprobResponse(Contract):
    """Sum of the response tokens' log-probs at temperature 1, nats, `[items][responses]`."""

    scorer: str
    revision: str
    logprobs: tuple[tuple[float, ...], ...]


class ScorerSpec(Contract):
    """Body of `PUT /v1/scorers/{name}`. Loading what is loaded already is a no-op."""

    kind: ScorerKind
    checkpoint: StorePath = Field(description="Folder in the artifact store, with its manifest.")
    max_tokens: int | None = Field(default=None, ge=1, description="Longest sequence; default is the model's.")
    truncate: Literal["refuse", "left"] = Field(
        default="refuse",
        description="What happens to longer sequences: an error naming the item, or cut from the left.",
    )


class ScorerInfo(Contract):
    """A loaded scorer, as `GET /v1/scorers` lists it."""

    name: str
    spec: ScorerSpec
    revision: str = Field(description="The checkpoint's version, as in its manifest.")
    template_hash: str
    parameters: int
    dtype: str
    proofs: dict[str, float] = Field(description="Measured deviation of each self-proof passed at load.")


class ScoreRow(Contract):
    """One row of `scores/{chunk}.parquet`: all rewards of one prompt, in the order of the rollout's responses."""

    prompt_id: str
    rewards: tuple[float, ...]
    reference_logprobs: tuple[float, ...] | None = Field(
        default=None, description="Sum log-prob of each response under the fixed reference (evaluation only), nats."
    )
    scorer: str
    revision: str
    template_hash: str

    @model_validator(mode="after")
    def _finite(self) -> Self:
        for index, reward in enumerate(self.rewards):
            if reward != reward or reward in (float("inf"), float("-inf")):
                raise ValueError(
                    f"rewards.{index} of prompt {self.prompt_id!r} is {reward}; a score is never defaulted"
                )
        return self
