"""From a conversation to the token ids a reward model reads: template, special tokens and truncation, all explicit.

The rules: the checkpoint's own chat template over prompt and response, no generation prompt; the templated text is
tokenised without adding special tokens, so that BOS is there exactly when the template writes it (adding it again is
what breaks reward models silently, OpenRLHF#1311). They are hashed, and the hash travels with every score.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from typing import Any, Literal

from jinja2 import TemplateError

from services.contracts.errors import InvalidInput
from services.contracts.scores import ScoreItem
from services.reward.scorers import TokenSequence


class ConversationTemplate:
    """Renders and tokenises conversations for one scorer.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        max_tokens: Longest sequence the scorer takes.
        truncate: What happens to a longer one: `refuse`, or cut from the `left` (the response's end is kept).
    """

    def __init__(self, tokenizer: Any, *, max_tokens: int, truncate: Literal["refuse", "left"]) -> None:
        self._tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.truncate = truncate
        self.hash = _hash(
            chat_template=tokenizer.chat_template,
            special_tokens={name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
            generation_prompt=False,
            add_special_tokens=False,
            max_tokens=max_tokens,
            truncate=truncate,
        )
        # Fast tokenizers keep truncation and padding as state in Rust: "Already borrowed" when two threads meet
        self._lock = threading.Lock()

    def render(self, item: ScoreItem, response: str) -> str:
        """The conversation with its response as the text that is tokenised."""
        messages = [message.model_dump() for message in item.messages] + [{"role": "assistant", "content": response}]
        return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of templated texts, nothing added, nothing cut."""
        with self._lock:
            return self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]

    def prepare(self, items: Sequence[ScoreItem]) -> list[TokenSequence]:
        """Every response of every item, in order, as tokens within the limit. Blocks for the tokenisation.

        Raises:
            InvalidInput: naming the item or response: empty, longer than `max_tokens` (with `refuse`), a conversation
                that does not end with the user's turn, or that the chat template refuses.
        """
        places: list[str] = []
        texts: list[str] = []
        for i, item in enumerate(items):
            if item.messages[-1].role != "user":
                raise InvalidInput(
                    f"the last message has the role {item.messages[-1].role!r}; a response answers the user's turn, so "
                    "it must be 'user'",
                    field=f"items.{i}.messages",
                )
            for j, response in enumerate(item.responses):
                place = f"items.{i}.responses.{j}"
                if not response and not item.allow_empty:
                    raise InvalidInput(
                        "the response is empty; drop it, or send allow_empty if the policy really ended its turn",
                        field=place,
                    )
                try:
                    texts.append(self.render(item, response))
                except (TemplateError, ValueError, TypeError) as error:
                    raise InvalidInput(
                        f"the scorer's chat template refuses the conversation: {error}", field=f"items.{i}.messages"
                    ) from error
                places.append(place)
        tokenised = self.tokenise(texts)
        return [
            TokenSequence(self._within_limit(ids, place), place) for ids, place in zip(tokenised, places, strict=True)
        ]

    def _within_limit(self, token_ids: list[int], place: str) -> list[int]:
        if len(token_ids) <= self.max_tokens:
            return token_ids
        if self.truncate == "refuse":
            raise too_long(
                len(token_ids),
                self.max_tokens,
                place,
                remedy="or load the scorer with truncate 'left' (reward_truncate in a recipe)",
            )
        return token_ids[-self.max_tokens :]

    def leading_bos(self) -> int:
        """How many BOS tokens stand at the start of a short conversation: 0 or 1 is right, 2 is the classic error."""
        bos = self._tokenizer.bos_token_id
        item = ScoreItem.model_validate({"messages": [{"role": "user", "content": "Hello"}], "responses": ["Hi"]})
        (ids,) = self.tokenise([self.render(item, "Hi")])
        count = 0
        while bos is not None and count < len(ids) and ids[count] == bos:
            count += 1
        return count


def too_long(tokens: int, limit: int, place: str, *, remedy: str) -> InvalidInput:
    """The error for a sequence over the scorer's limit."""
    return InvalidInput(
        f"prompt and response have {tokens:,} tokens, the scorer takes at most {limit:,}; drop or shorten it, {remedy}",
        field=place,
    )


def exact_tokens_hash(max_tokens: int) -> str:
    """`template_hash` of a scorer that takes token ids as they are."""
    return _hash(exact_token_ids=True, max_tokens=max_tokens, truncate="refuse")


def _hash(**rules: Any) -> str:
    return hashlib.sha256(json.dumps(rules, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
