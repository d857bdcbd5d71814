"""Preference pairs and the reasons for which a prompt gives none."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from services.contracts.conversations import Message
from services.contracts.model import Contract, TokenIds
from services.contracts.tracing import TraceId

PairRuleName = Literal["best_worst", "best_second", "best_random", "random"]


class DropReason(StrEnum):
    """Why a prompt or a response did not become part of a pair. Every drop is counted under one of these."""

    GENERATION_FAILED = "generation_failed"
    RESPONSE_TRUNCATED = "response_truncated"
    RESPONSE_EMPTY = "response_empty"
    TOO_FEW_RESPONSES = "too_few_responses"
    IDENTICAL_TOKENS = "identical_tokens"
    TIE = "tie"
    BELOW_MARGIN = "below_margin"


class LengthPenalty(Contract):
    """r'(x, a) = r(x, a) - weight * |a| (Dong et al. 2024, section 3.3; their concise model: 0.001 per character).

    Applied before selection, and the pair keeps the orientation that the penalised rewards give.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    weight: float = Field(ge=0.0, description="Taken off the reward for each unit (the paper: 0.001 per character).")
    unit: Literal["characters", "tokens"] = Field(default="characters", description="What is counted.")


class PairRules(Contract):
    """How pairs are made from scored rollouts."""

    model_config = ConfigDict(allow_inf_nan=False)

    rule: PairRuleName = Field(
        default="best_worst", description="Which two responses of a prompt become its pair (the paper: best and worst)."
    )
    length_penalty: LengthPenalty | None = None
    min_margin: float = Field(
        default=0.0, ge=0.0, description="Pairs whose (penalised) margin is not above it are dropped."
    )
    drop_truncated: bool = Field(default=True, description="Drop responses that ended by length, not by an end token.")


class Pair(Contract):
    """One row of `pairs.parquet`: TRL's conversational preference columns plus the exact token ids and the lineage."""

    prompt_id: str
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    prompt_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds
    chosen_reward: float = Field(description="Raw reward of the chosen response.")
    rejected_reward: float
    margin: float = Field(gt=0.0, description="Difference of the (penalised) rewards by which the pair was oriented.")
    chosen_index: int
    rejected_index: int
    policy_version: str
    scorer: str
    scorer_revision: str
    trace_id: TraceId | None = Field(
        default=None, description="Names the prompt in the logs of every service; files of before 0.2 have none."
    )

    @model_validator(mode="after")
    def _differs(self) -> Self:
        if self.chosen_ids == self.rejected_ids:
            raise ValueError(f"prompt {self.prompt_id!r}: chosen and rejected are the same token ids")
        return self
