"""Chat completions: the request's JSON, and the answers as values."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import httpx_sse
from pydantic import SerializerFunctionWrapHandler, model_serializer

from services.contracts.conversations import Message
from services.contracts.errors import UpstreamFailed
from services.contracts.model import Contract

VERSION_HEADER = "X-Policy-Version"


@dataclass(frozen=True)
class ChatAnswer:
    """One sampled answer."""

    text: str
    finish_reason: str
    policy_version: str | None
    """The weights that answered."""


class ChatRequest(Contract):
    """Body of `POST /v1/chat/completions`; what is None is left to the model's own defaults."""

    model: str
    messages: tuple[Message, ...]
    stream: bool = False
    n: int | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    top_p: float | None = None
    seed: int | None = None

    @model_serializer(mode="wrap")
    def _without_nulls(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if value is not None}


def as_messages(messages: Sequence[Message] | str) -> tuple[Message, ...]:
    """A string is one user message."""
    return (Message(role="user", content=messages),) if isinstance(messages, str) else tuple(messages)


def chat_answers(response: httpx.Response) -> list[ChatAnswer]:
    """All answers of a completion. Raises UpstreamFailed when it is not one."""
    try:
        return [
            ChatAnswer(
                choice["message"]["content"] or "", choice["finish_reason"] or "", response.headers.get(VERSION_HEADER)
            )
            for choice in response.json()["choices"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UpstreamFailed(f"the generator answered no chat completion: {response.text[:200]!r}") from error


async def chat_pieces(response: httpx.Response) -> AsyncIterator[str]:
    """Text of a streamed completion, piece by piece. Raises UpstreamFailed for an error within the stream."""
    async for event in httpx_sse.EventSource(response).aiter_sse():
        if event.data == "[DONE]":
            return
        data: dict[str, Any] = event.json()
        if "error" in data or "choices" not in data:
            raise UpstreamFailed(f"the generator broke off the answer: {event.data[:300]}")
        for choice in data["choices"]:
            if piece := choice.get("delta", {}).get("content"):
                yield piece
