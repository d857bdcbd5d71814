"""Prompt readers: the forms people have, and every way a file can be broken. Draws and seeds."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts.conversations import Message, prompt_id
from services.contracts.errors import InvalidInput
from services.orchestrator.draws import derive_seed, draw_prompts
from services.orchestrator.prompts import prompt_of, read_objects, read_prompts

USER = {"role": "user", "content": "Hi"}
DIALOGUE = [USER, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "And now?"}]


def lines(*rows: Any) -> bytes:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode()


@pytest.mark.parametrize(
    ("row", "contents"),
    [
        ({"prompt": "Hi"}, ["Hi"]),
        ({"prompt": [USER]}, ["Hi"]),
        ({"messages": DIALOGUE}, ["Hi", "Hello", "And now?"]),
        ({"context_messages": DIALOGUE, "prompt": "other"}, ["Hi", "Hello", "And now?"]),
        ({"question_id": 81, "category": "writing", "turns": ["First?", "Then?"]}, ["First?"]),
        ({"question": "2 + 2?", "answer": "#### 4"}, ["2 + 2?"]),
        ({"prompt": "Hi", "messages": [USER, {"role": "assistant", "content": "an answer"}]}, ["Hi"]),
        ({"messages": [{"role": "system", "content": "Be brief."}, USER]}, ["Be brief.", "Hi"]),
        ({"prompt": None, "question": "Which?"}, ["Which?"]),
    ],
)
def test_a_row_of_each_form_is_read(row: dict[str, Any], contents: list[str]) -> None:
    prompt = prompt_of(row)
    assert [message.content for message in prompt.messages] == contents
    assert prompt.id == prompt_id(prompt.messages)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("not json", "line 2: is not JSON"),
        ("[1, 2]", "line 2: is a list, not an object"),
        ('"text"', "line 2: is text, not an object"),
        ({"text": "Hi"}, "line 2: has none of the columns context_messages, prompt, messages, turns, question"),
        ({"prompt": ""}, "line 2: prompt is empty"),
        ({"prompt": " \n"}, "line 2: prompt is empty"),
        ({"prompt": 7}, "line 2: prompt is a number, not text"),
        ({"prompt": True}, "line 2: prompt is true or false, not text"),
        ({"messages": "Hi"}, "line 2: messages is text, not a list"),
        ({"messages": []}, "line 2: messages is an empty list"),
        ({"messages": ["Hi"]}, "line 2: messages.0 is text, not an object"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "line 2: messages.0.role: "),
        ({"messages": [{"role": "user"}]}, "line 2: messages.0.content: "),
        ({"messages": [{"role": "user", "content": ""}]}, "line 2: message 0 (user) is empty"),
        ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "line 2: the last message must be the user's"),
        ({"turns": []}, "line 2: turns is an empty list"),
        ({"turns": "x"}, "line 2: turns is text, not a list"),
        ({"turns": [""]}, "line 2: turns.0 is empty"),
        ({"question": ["x"]}, "line 2: question is a list, not text"),
    ],
)
def test_a_broken_line_is_named_with_its_fault(line: Any, says: str) -> None:
    data = lines({"prompt": "fine"}, line, {"prompt": "fine too"})
    with pytest.raises(InvalidInput) as caught:
        read_prompts(data, "jsonl", "refuse", field="recipe.prompts.path")
    assert says in caught.value.detail
    assert caught.value.field == "recipe.prompts.path"
    assert "on_error = skip" in caught.value.detail
    skipped = read_prompts(data, "jsonl", "skip")
    assert [row.messages[0].content for row in skipped.rows] == ["fine", "fine too"]
    assert skipped.skipped_count == 1
    assert says in skipped.skipped[0]


def test_bytes_that_are_not_utf8_are_named() -> None:
    with pytest.raises(InvalidInput, match="line 1: is not UTF-8"):
        read_prompts(b'{"prompt": "\xff"}\n', "jsonl", "refuse")


def test_many_broken_lines_are_counted_and_the_first_shown() -> None:
    with pytest.raises(InvalidInput, match=r"9 of 9 prompts cannot be read\. line 1: .*; and 4 more"):
        read_prompts(lines(*["{"] * 9), "jsonl", "refuse")


@pytest.mark.parametrize("data", [b"", b"\n \n"])
def test_an_empty_file_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidInput, match="the file is empty"):
        read_prompts(data, "jsonl", "skip")


def test_a_file_of_broken_lines_only_is_refused_even_when_skipping() -> None:
    with pytest.raises(InvalidInput, match="all 2 lines are broken, the first: line 1"):
        read_prompts(b"{\n{", "jsonl", "skip")


def test_blank_lines_windows_ends_and_a_byte_order_mark_are_fine() -> None:
    data = b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n'
    assert len(read_prompts(data, "jsonl", "refuse").rows) == 2


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def test_parquet_is_read_and_its_broken_rows_are_numbered() -> None:
    assert (
        read_prompts(parquet([{"messages": DIALOGUE}]), "parquet", "refuse").rows[0].messages[2].content == "And now?"
    )
    with pytest.raises(InvalidInput, match="row 2: prompt is empty"):
        read_prompts(parquet([{"prompt": "a"}, {"prompt": ""}]), "parquet", "refuse")
    with pytest.raises(InvalidInput, match="not readable Parquet"):
        read_prompts(b"PAR1 or not", "parquet", "refuse")
    with pytest.raises(InvalidInput, match="the file is empty"):
        read_prompts(parquet([{"prompt": "a"}])[:0] or parquet([]), "parquet", "refuse")


def test_other_files_are_checked_to_be_rows() -> None:
    assert len(read_objects(lines({"chosen": 1}, {"x": 2}), "jsonl", "refuse").rows) == 2
    with pytest.raises(InvalidInput, match="line 1: is a list"):
        read_objects(b"[1]", "jsonl", "refuse")


IDS = [f"prompt-{number}" for number in range(20)]


def test_iterations_draw_fresh_prompts_until_the_pool_is_used_up() -> None:
    drawn = [id for t in (1, 2) for id in draw_prompts(IDS, 10, t, seed=1)]
    assert sorted(drawn) == sorted(IDS)
    again = draw_prompts(IDS, 10, 3, seed=1)
    assert again != drawn[:10]


def test_the_draw_depends_on_the_seed_and_not_on_the_order_of_the_file() -> None:
    assert draw_prompts(IDS, 5, 2, seed=1) == draw_prompts(IDS[::-1], 5, 2, seed=1)
    assert draw_prompts(IDS, 5, 2, seed=1) != draw_prompts(IDS, 5, 2, seed=2)


@given(size=st.integers(1, 30), count=st.integers(1, 30), iterations=st.integers(1, 8), seed=st.integers(0, 5))
def test_no_prompt_comes_twice_in_an_iteration_and_all_come_equally_often(
    size: int, count: int, iterations: int, seed: int
) -> None:
    ids = [str(number) for number in range(size)]
    if count > size:
        with pytest.raises(ValueError, match="cannot draw"):
            draw_prompts(ids, count, 1, seed)
        return
    uses = dict.fromkeys(ids, 0)
    for t in range(1, iterations + 1):
        drawn = draw_prompts(ids, count, t, seed)
        assert len(set(drawn)) == len(drawn) == count
        for id in drawn:
            uses[id] += 1
    assert max(uses.values()) - min(uses.values()) <= 1


def test_seeds_differ_by_purpose_and_iteration_and_fit_the_contract() -> None:
    seeds = [
        derive_seed(7, "sample", 1),
        derive_seed(7, "sample", 2),
        derive_seed(7, "evaluate"),
        derive_seed(8, "evaluate"),
    ]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(7, "evaluate") == derive_seed(7, "evaluate")


def test_a_prompt_s_id_comes_from_its_messages() -> None:
    assert prompt_of({"prompt": "Hi"}).id == prompt_of({"messages": [USER]}).id
    assert prompt_of({"prompt": "Hi"}).messages == (Message(role="user", content="Hi"),)


@pytest.mark.parametrize("line", [r'{"prompt": "a \ud800"}', r'{"messages": [{"role": "user", "content": "\ud800"}]}'])
def test_half_a_surrogate_pair_is_a_broken_line_like_any_other(line: str) -> None:
    data = lines({"prompt": "Hi"}, line)
    with pytest.raises(InvalidInput, match=r"line 2: .*half a surrogate pair"):
        read_prompts(data, "jsonl", "refuse")
    reading = read_prompts(data, "jsonl", "skip")
    assert (len(reading.rows), reading.skipped_count) == (1, 1)
