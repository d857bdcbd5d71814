"""Which tokens carry loss: the assistant's, up to the end token, whatever the template marks."""

from typing import Any

import pytest

from services.contracts.conversations import Message
from services.contracts.errors import InvalidInput
from services.trainer.data import Demonstration
from services.trainer.tokens import IGNORED, encode_conversations, encode_demonstrations, end_tokens
from tests.fixtures.models import CHAT_TEMPLATE, make_tokenizer


def turns(*texts: str) -> tuple[Message, ...]:
    return tuple(Message(role="user" if i % 2 == 0 else "assistant", content=text) for i, text in enumerate(texts))


@pytest.fixture
def tokenizer() -> Any:
    from copy import deepcopy

    return deepcopy(make_tokenizer())


def trained(tokenizer: Any, row: Demonstration, *, assistant_only: bool = True) -> str:
    stop = frozenset({tokenizer.eos_token_id})
    (sequence,) = encode_demonstrations(tokenizer, [row], assistant_only=assistant_only, stop_ids=stop)
    assert len(sequence.input_ids) == len(sequence.labels)
    assert all(label in (IGNORED, token) for token, label in zip(sequence.input_ids, sequence.labels, strict=True))
    return tokenizer.decode([label for label in sequence.labels if label != IGNORED])


def test_every_assistant_turn_is_trained_with_its_end_token(tokenizer: Any) -> None:
    row = Demonstration(turns("What is it?", "A sea.", "And that?", "A sky."))
    assert trained(tokenizer, row) == "A sea.</s>A sky.</s>"


def test_of_a_prompt_with_history_only_the_completion_is_trained(tokenizer: Any) -> None:
    row = Demonstration(turns("What is it?", "A sea.", "And that?", "A sky."), trained=1)
    assert trained(tokenizer, row) == "A sky.</s>"


def test_without_assistant_only_loss_everything_is_trained(tokenizer: Any) -> None:
    row = Demonstration(turns("Hi", "Ho"))
    assert trained(tokenizer, row, assistant_only=False) == "<s><|user|>Hi<|assistant|>Ho</s>"


def test_text_after_the_end_token_is_not_trained(tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ eos_token }}", "{{ eos_token + '\n' }}")
    assert trained(tokenizer, Demonstration(turns("Hi", "Ho"))) == "Ho</s>"


def test_bos_stands_once(tokenizer: Any) -> None:
    (ids,) = encode_conversations(tokenizer, [turns("Hi", "Ho")])
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_template_that_never_ends_a_turn_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ eos_token }}", "\n")
    with pytest.raises(InvalidInput, match="never learn to stop"):
        trained(tokenizer, Demonstration(turns("Hi", "Ho")))


def test_a_template_that_rewrites_history_is_refused_for_many_turns_only(tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{{ message['content'] }}", "{{ message['content'] if loop.last else message['content'][:2] }}"
    )
    with pytest.raises(InvalidInput, match=r"row 1: .*rewrite history"):
        trained(tokenizer, Demonstration(turns("Hello", "Goodbye", "Hello", "Goodbye")))


def test_a_template_that_raises_is_an_error_of_the_data(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidInput, match="roles must alternate"):
        trained(tokenizer, Demonstration(turns("Hi", "Ho")))


def test_end_tokens_are_those_of_the_tokenizer_and_all_of_the_config(tokenizer: Any) -> None:
    from transformers import LlamaConfig

    eos = tokenizer.eos_token_id
    assert end_tokens(tokenizer, LlamaConfig(eos_token_id=[eos, 77])) == {eos, 77}
    assert end_tokens(tokenizer, LlamaConfig(eos_token_id=78)) == {eos, 78}
    assert end_tokens(tokenizer, LlamaConfig(eos_token_id=None)) == {eos}
