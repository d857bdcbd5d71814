"""Messages, conversations and prompts."""

from __future__ import annotations

import hashlib
import json
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from services.contracts.model import Contract
from services.contracts.tracing import TraceId

Role = Literal["system", "user", "assistant"]


class Message(Contract):
    """One turn of a conversation."""

    role: Role
    content: str

    @field_validator("content")
    @classmethod
    def _is_text(cls, value: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"is not Unicode text: half a surrogate pair at character {error.start}") from error
        return value


class Prompt(Contract):
    """A conversation that ends with the user's turn, waiting for the policy's response."""

    id: str = Field(min_length=1, max_length=200, description="Unique in its set; by default a hash of the messages.")
    messages: tuple[Message, ...] = Field(min_length=1)
    trace_id: TraceId | None = Field(
        default=None, description="Logged with the prompt by every service; `tracing.prompt_trace_id` in a run."
    )

    @model_validator(mode="after")
    def _ends_with_user(self) -> Self:
        if self.messages[-1].role != "user":
            raise ValueError(f"the last message must be the user's, not {self.messages[-1].role!r}")
        for index, message in enumerate(self.messages):
            if message.role == "user" and not message.content.strip():
                raise ValueError(f"message {index} (user) is empty")
        return self

    @classmethod
    def of(cls, messages: tuple[Message, ...]) -> Prompt:
        """A prompt whose id is derived from its messages, so that the same prompt has the same id everywhere."""
        return cls(id=prompt_id(messages), messages=messages)


def prompt_id(messages: tuple[Message, ...]) -> str:
    """First 16 hex digits of the SHA-256 of the messages' canonical JSON."""
    canonical = json.dumps([[m.role, m.content] for m in messages], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
