"""Template, special tokens and truncation of reward models."""

from typing import Any

import pytest

from services.contracts.conversations import Message
from services.contracts.errors import InvalidInput
from services.contracts.scores import ScoreItem
from services.reward.templates import ConversationTemplate
from tests.fixtures.models import make_tokenizer


def template(max_tokens: int = 64, truncate: Any = "refuse") -> ConversationTemplate:
    return ConversationTemplate(make_tokenizer(), max_tokens=max_tokens, truncate=truncate)


def item(*responses: str, role: Any = "user", content: str = "Name three colours.") -> ScoreItem:
    return ScoreItem(messages=(Message(role=role, content=content),), responses=responses)


def test_the_text_is_prompt_and_response_without_generation_prompt() -> None:
    assert template().render(item("x"), "Red.") == "<s><|user|>Name three colours.<|assistant|>Red.</s>"


def test_bos_is_there_exactly_as_the_template_writes_it() -> None:
    tokenizer = make_tokenizer()
    (sequence,) = template().prepare([item("Red.")])
    assert sequence.token_ids[0] == tokenizer.bos_token_id
    assert [token == tokenizer.bos_token_id for token in sequence.token_ids].count(True) == 1
    assert template().leading_bos() == 1


def test_a_template_that_doubles_bos_is_seen() -> None:
    doubled = template()
    render = doubled.render
    doubled.render = lambda item, response: "<s>" + render(item, response)  # pyright: ignore[reportAttributeAccessIssue]
    assert doubled.leading_bos() == 2


def test_responses_keep_the_order_of_items_and_their_places() -> None:
    got = template().prepare([item("Red.", "Blue."), item("Green.")])
    assert [s.place for s in got] == ["items.0.responses.0", "items.0.responses.1", "items.1.responses.0"]
    tokenizer = make_tokenizer()
    assert ["Red" in tokenizer.decode(s.token_ids) for s in got] == [True, False, False]


def test_a_longer_sequence_is_refused_with_its_tokens_and_the_limit() -> None:
    with pytest.raises(InvalidInput, match=r"\d+ tokens, the scorer takes at most 20") as error:
        template(20).prepare([item("Red."), item("a", "b" * 100)])
    assert error.value.field == "items.1.responses.1"


def test_left_truncation_keeps_the_end_of_the_response() -> None:
    whole = template(10_000).prepare([item("Red, green and blue are three colours." * 3)])[0].token_ids
    cut = template(20, "left").prepare([item("Red, green and blue are three colours." * 3)])[0].token_ids
    assert cut == whole[-20:]


@pytest.mark.parametrize(
    ("bad", "field"),
    [(item("ok", ""), "items.1.responses.1"), (item("ok", role="assistant"), "items.1.messages")],
    ids=["empty response", "no user turn"],
)
def test_bad_input_is_named(bad: ScoreItem, field: str) -> None:
    with pytest.raises(InvalidInput) as error:
        template().prepare([item("ok"), bad])
    assert error.value.field == field


def test_what_the_chat_template_refuses_is_the_caller_s_error() -> None:
    tokenizer = make_tokenizer()
    refusing = ConversationTemplate(tokenizer, max_tokens=64, truncate="refuse")
    original = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(InvalidInput, match="roles must alternate") as error:
            refusing.prepare([item("ok")])
    finally:
        tokenizer.chat_template = original
    assert error.value.field == "items.0.messages"


def test_the_hash_changes_with_each_rule() -> None:
    assert template().hash == template().hash
    assert len({template().hash, template(65).hash, template(64, "left").hash}) == 3


def test_an_empty_response_is_scored_when_the_policy_really_gave_it() -> None:
    given = item("ok", "").model_copy(update={"allow_empty": True})
    ok, empty = template().prepare([given])
    assert 0 < len(empty.token_ids) < len(ok.token_ids)
