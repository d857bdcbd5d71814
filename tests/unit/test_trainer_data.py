"""Training data: every accepted form, and errors that name the line."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services.contracts.errors import InvalidInput
from services.trainer.data import read_demonstrations, read_preferences

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}


def lines(*rows: object) -> bytes:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode()


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [USER], "completion": [ASSISTANT], "id": 3},
        {"question": "Hi", "answer": "Hello"},
    ],
)
def test_each_form_of_demonstration_becomes_a_conversation(row: dict[str, object]) -> None:
    (found,) = read_demonstrations(lines(row), "d.jsonl")
    assert [(m.role, m.content) for m in found.messages] == [("user", "Hi"), ("assistant", "Hello")]


def test_only_the_completion_of_a_prompt_with_history_is_trained() -> None:
    (found,) = read_demonstrations(lines({"prompt": [USER, ASSISTANT, USER], "completion": "Bye"}), "d.jsonl")
    assert (len(found.messages), found.trained) == (4, 1)


def test_parquet_is_read_like_jsonl(tmp_path) -> None:
    pq.write_table(pa.Table.from_pylist([{"messages": [USER, ASSISTANT]}] * 2), tmp_path / "d.parquet")
    assert len(read_demonstrations((tmp_path / "d.parquet").read_bytes(), "d.parquet")) == 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"messages": [', "line 2: not JSON"),
        ("[1]", "line 2: is list, not a JSON object"),
        ({"text": "Hi"}, "has the fields ['text']; needed are messages"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "messages.1 (assistant) is empty"),
        ({"prompt": "", "completion": "x"}, "prompt is empty"),
        ({"prompt": "x", "completion": [USER]}, "must end with the assistant's turn"),
    ],
)
def test_a_broken_line_is_named_with_what_is_wrong(row: object, words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_demonstrations(lines({"question": "a", "answer": "b"}, row), "d.jsonl")
    assert "line 2" in caught.value.detail
    assert words in caught.value.detail
    assert caught.value.field == "data"


def test_many_broken_lines_are_counted() -> None:
    with pytest.raises(InvalidInput, match="and 15 more"):
        read_demonstrations(lines(*["{"] * 20), "d.jsonl")


def test_no_rows_and_bytes_that_are_no_text_are_errors() -> None:
    with pytest.raises(InvalidInput, match="no rows"):
        read_demonstrations(b"\n\n", "d.jsonl")
    with pytest.raises(InvalidInput, match="not UTF-8"):
        read_demonstrations(b"\xff\xfe{}", "d.jsonl")
    with pytest.raises(InvalidInput, match="not a readable Parquet"):
        read_demonstrations(b"PAR1nonsense", "d.parquet")


def test_preferences_are_whole_conversations() -> None:
    (found,) = read_preferences(lines({"prompt": "Hi", "chosen": "A", "rejected": [ASSISTANT]}), "p.jsonl")
    assert [m.content for m in found.chosen] == ["Hi", "A"]
    assert [m.content for m in found.rejected] == ["Hi", "Hello"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "Hi", "chosen": "A"}, "has no rejected"),
        ({"prompt": "Hi", "chosen": "A", "rejected": "A"}, "are the same"),
        ({"chosen": "A", "rejected": "B"}, "no prompt before"),
    ],
)
def test_a_broken_preference_is_named(row: object, words: str) -> None:
    with pytest.raises(InvalidInput, match=f"line 1: .*{words}"):
        read_preferences(lines(row), "p.jsonl")
