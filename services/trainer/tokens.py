"""Conversations as token ids, and which of the tokens are the assistant's, through the policy's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from services.contracts.conversations import Message
from services.contracts.errors import InvalidInput
from services.trainer.data import Demonstration

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that carries no loss (PyTorch's convention)."""


@dataclass(frozen=True)
class LabelledSequence:
    """One training sequence: `[seq]` token ids, and `[seq]` labels, IGNORED where there is no loss."""

    input_ids: list[int]
    labels: list[int]


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generate: bool = False) -> str:
    """A conversation through the chat template; `generate`: up to where the assistant's next turn begins.

    Raises:
        InvalidInput: there is no chat template, or it refuses the conversation (roles out of order, …).
    """
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate))
    except Exception as error:
        raise InvalidInput(
            f"the chat template refuses a conversation with the roles {[m.role for m in messages]}: {error}"
        ) from error


def end_tokens(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> frozenset[int]:
    """Token ids that end a text, by the tokenizer and by config.json (which may name several). None may be the pad."""
    configured: Any = config.eos_token_id
    own: Any = tokenizer.eos_token_id
    found: list[Any] = configured if isinstance(configured, list) else [configured]
    return frozenset(int(i) for i in (*found, own) if i is not None)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Any:
    """Rendered texts as token ids. The template has written BOS already, so none is added (never two)."""
    return tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]]
) -> list[list[int]]:
    """Whole conversations (no generation prompt) as token ids: what a reward model reads."""
    return tokenizer([render(tokenizer, c) for c in conversations], add_special_tokens=False, verbose=False)[
        "input_ids"
    ]


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Demonstration],
    *,
    assistant_only: bool,
    stop_ids: frozenset[int],
) -> list[LabelledSequence]:
    """Demonstrations with their labels.

    The assistant's part of a turn is what follows the text that the generator would be given: the template's rendering
    of the turns before it, with the generation prompt. So no `{% generation %}` marks are needed. A turn's loss ends
    with its end token, since generation never goes past it.

    Raises:
        InvalidInput: the template renders earlier turns differently once a later one follows, or it closes no turn
            with a token that generation stops at (the policy would never learn to stop).
    """
    if not tokenizer.is_fast:
        raise InvalidInput(
            "training needs a fast tokenizer (tokenizer.json); convert it with AutoTokenizer and save it"
        )
    texts = [render(tokenizer, row.messages) for row in rows]
    encoded = encode(tokenizer, texts)
    sequences: list[LabelledSequence] = []
    for number, (row, text) in enumerate(zip(rows, texts, strict=True), start=1):
        ids: list[int] = encoded["input_ids"][number - 1]
        labels = list(ids)
        if assistant_only:
            labels = [IGNORED] * len(ids)
            for start, end in _assistant_spans(tokenizer, row, text, number):
                inside = [
                    i for i, (a, b) in enumerate(encoded["offset_mapping"][number - 1]) if a >= start and b <= end
                ]
                stops = [position for position in inside if ids[position] in stop_ids]
                if not stops:
                    raise InvalidInput(
                        f"row {number}: the chat template ends an assistant turn with "
                        f"{text[max(start, end - 20) : end]!r}, which holds no token that generation stops at "
                        f"({tokenizer.convert_ids_to_tokens(sorted(stop_ids))}); the policy would never learn to stop. "
                        "Let the template close the turn with the eos token, or name its end token in the "
                        "eos_token_id of generation_config.json",
                        field="start",
                    )
                for position in inside:
                    if position <= stops[-1]:
                        labels[position] = ids[position]
        sequences.append(LabelledSequence(ids, labels))
    return sequences


def _assistant_spans(
    tokenizer: PreTrainedTokenizerBase, row: Demonstration, text: str, number: int
) -> list[tuple[int, int]]:
    """Character spans of the trained assistant turns in the rendered text."""
    first = len(row.messages) - row.trained if row.trained is not None else 0
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(row.messages):
        if message.role != "assistant" or index < first:
            continue
        before = render(tokenizer, row.messages[:index], generate=True) if index else ""
        after = text if index == len(row.messages) - 1 else render(tokenizer, row.messages[: index + 1])
        if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
            raise InvalidInput(
                f"row {number}: the chat template renders the turns before message {index} differently once it follows "
                f"(…{before[-40:]!r}), so what the policy is trained on is not what it is asked at generation. Split "
                "the conversation into rows of prompt and completion, or use a template that does not rewrite history",
                field="data",
            )
        spans.append((len(before), len(after)))
    return spans
