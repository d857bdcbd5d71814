"""Looking through an iteration's pairs: what to show, in which order, and one pair whole."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from services.contracts.conversations import Message
from services.contracts.model import Contract
from services.contracts.pairs import Pair
from services.contracts.rollouts import FinishReason

PairSort = Literal["row", "margin", "chosen_reward", "rejected_reward", "chosen_tokens", "rejected_tokens"]


class PairQuery(Contract):
    """Which pairs, in which order. Pairs that compare equal keep the order of the file."""

    model_config = ConfigDict(allow_inf_nan=False)

    sort: PairSort = Field(default="row", description="`row` is the order of pairs.parquet.")
    descending: bool = False
    search: str | None = Field(
        default=None, max_length=200, description="Text found in prompt, chosen or rejected, in any case."
    )
    min_margin: float | None = None
    max_margin: float | None = None


MAX_PAGE = 1000
"""Most rows of one page."""


class PairPageQuery(PairQuery):
    """Query parameters of `GET /v1/runs/{id}/iterations/{t}/pairs`."""

    offset: int = Field(default=0, ge=0, description="Pairs to skip, of those found.")
    limit: int = Field(default=50, ge=1, le=MAX_PAGE)


class PairPage(Contract):
    """Answer of `GET /v1/runs/{id}/iterations/{t}/pairs`."""

    total: int = Field(description="Pairs the query finds.")
    offset: int
    rows: tuple[Pair, ...]
    numbers: tuple[int, ...] = Field(description="Row number of each in pairs.parquet; names a pair for good.")


class JudgedResponse(Contract):
    """One of the n responses to a pair's prompt."""

    index: int
    text: str
    reward: float | None = Field(description="Raw reward; None where it was not scored (an empty response).")
    tokens: int
    finish_reason: FinishReason
    temperature: float
    role: Literal["chosen", "rejected"] | None = None


class PairDetail(Contract):
    """Answer of `GET /v1/runs/{id}/iterations/{t}/pairs/{number}`: a pair among all responses it was chosen from."""

    number: int
    total: int
    pair: Pair
    messages: tuple[Message, ...]
    responses: tuple[JudgedResponse, ...] = Field(description="In the order they were sampled.")
