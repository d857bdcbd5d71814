"""Readers of prompt sets: JSONL or Parquet in the forms people have. Every broken line is named, none is lost silently.

| column | form |
|---|---|
| `context_messages` | list of `{role, content}` whose last turn is the user's (RLHFlow's prompt sets) |
| `prompt` | text, or such a list (TRL's conversational form) |
| `messages` | such a list |
| `turns` | list of texts (MT-Bench): the first turn is the prompt; later ones need an answer first and are not used |
| `question` | text (GSM8K) |

When a row has several of them, the first in this order counts. Other columns are ignored. A prompt's id is derived
from its messages.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from services.contracts.conversations import Message, Prompt
from services.contracts.errors import InvalidInput

T = TypeVar("T")
Format = Literal["jsonl", "parquet"]
Found = tuple[str, Any]
SHOWN_ERRORS = 5
KEPT_ERRORS = 1000
"""Reasons kept of a file whose broken lines are skipped; all are counted."""


class LineError(ValueError):
    """What is wrong with one line; the reader adds its number."""


@dataclass(frozen=True)
class Reading(Generic[T]):
    """Rows of a file and the lines that were skipped."""

    rows: tuple[T, ...]
    skipped: tuple[str, ...] = ()
    """`line 17: …`, at most `KEPT_ERRORS`."""
    skipped_count: int = 0


def read_prompts(
    data: bytes, form: Format, on_error: Literal["refuse", "skip"], *, field: str = "file"
) -> Reading[Prompt]:
    """The prompts of a file, in its order.

    Args:
        field: Name of the request's field that gave the file, for the error.

    Raises:
        InvalidInput: a broken line (when they are to be refused), naming line and fault; or no prompt at all.
    """
    return _read(data, form, on_error, prompt_of, field=field, what="prompt")


def read_objects(
    data: bytes, form: Format, on_error: Literal["refuse", "skip"], *, field: str = "file"
) -> Reading[None]:
    """Check that a file of any other kind is rows of JSON objects (or Parquet). Raises InvalidInput."""
    return _read(data, form, on_error, lambda _: None, field=field, what="row")


def prompt_of(row: dict[str, Any]) -> Prompt:
    """The prompt of one row. Raises LineError."""
    for column, reader in READERS.items():
        if row.get(column) is not None:
            try:
                return Prompt.of(reader(row[column], column))
            except ValidationError as error:
                raise LineError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
    shown = ", ".join(name.encode(errors="backslashreplace").decode() for name in sorted(row)[:8]) or "none"
    raise LineError(f"has none of the columns {', '.join(READERS)} (its columns: {shown})")


def _text(value: object, column: str) -> tuple[Message, ...]:
    if not isinstance(value, str):
        raise LineError(f"{column} is {_kind(value)}, not text")
    if not value.strip():
        raise LineError(f"{column} is empty")
    return (Message(role="user", content=value),)


def _messages(value: object, column: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise LineError(f"{column} is {_kind(value)}, not a list of {{role, content}}")
    turns = cast("list[object]", value)
    if not turns:
        raise LineError(f"{column} is an empty list")
    found: list[Message] = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise LineError(f"{column}.{index} is {_kind(turn)}, not an object with role and content")
        keys = cast("dict[str, Any]", turn)
        try:
            found.append(Message(role=keys.get("role"), content=keys.get("content")))  # pyright: ignore[reportArgumentType]
        except ValidationError as error:
            first = error.errors()[0]
            given = first["input"]
            raise LineError(f"{column}.{index}.{first['loc'][0]}: {first['msg']} (got {str(given)[:60]!r})") from error
    return tuple(found)


def _text_or_messages(value: object, column: str) -> tuple[Message, ...]:
    return _messages(cast("object", value), column) if isinstance(value, list) else _text(value, column)


def _first_turn(value: object, column: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise LineError(f"{column} is {_kind(value)}, not a list of texts")
    turns = cast("list[object]", value)
    if not turns:
        raise LineError(f"{column} is an empty list")
    return _text(turns[0], f"{column}.0")


READERS: dict[str, Callable[[object, str], tuple[Message, ...]]] = {
    "context_messages": _messages,
    "prompt": _text_or_messages,
    "messages": _messages,
    "turns": _first_turn,
    "question": _text,
}


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = (("dict", "an object"), ("list", "a list"), ("str", "text"), ("int", "a number"), ("float", "a number"))
    return dict(names).get(type(value).__name__, type(value).__name__)


def _read(
    data: bytes, form: Format, on_error: Literal["refuse", "skip"], convert: Callable[[dict[str, Any]], T], *,
    field: str, what: str,
) -> Reading[T]:  # fmt: skip
    rows: list[T] = []
    faults: list[str] = []
    broken = 0
    for place, row in _jsonl(data) if form == "jsonl" else _parquet(data, field):
        try:
            if isinstance(row, LineError):
                raise row
            rows.append(convert(row))
        except LineError as error:
            broken += 1
            if len(faults) < KEPT_ERRORS:
                faults.append(f"{place}: {error}")
    if broken and on_error == "refuse":
        more = f"; and {broken - SHOWN_ERRORS} more" if broken > SHOWN_ERRORS else ""
        raise InvalidInput(
            f"{broken} of {broken + len(rows)} {what}s cannot be read. {'; '.join(faults[:SHOWN_ERRORS])}{more}. "
            "Mend the file, or set on_error = skip to leave such lines out",
            field=field,
        )
    if not rows:
        why = f"all {broken} lines are broken, the first: {faults[0]}" if faults else "the file is empty"
        raise InvalidInput(f"no {what} can be read: {why}", field=field)
    return Reading(tuple(rows), tuple(faults), broken)


def _jsonl(data: bytes) -> Iterator[tuple[str, dict[str, Any] | LineError]]:
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        yield f"line {number}", _json_row(line)


def _json_row(line: bytes) -> dict[str, Any] | LineError:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return LineError(f"is not UTF-8 (byte {error.start})")
    except ValueError as error:
        return LineError(f"is not JSON: {error}")
    except RecursionError:
        return LineError("is nested too deeply")
    if not isinstance(row, dict):
        return LineError(f"is {_kind(row)}, not an object")
    return cast("dict[str, Any]", row)


def _parquet(data: bytes, field: str) -> Iterator[tuple[str, dict[str, Any] | LineError]]:
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        number = 0
        for group in range(file.num_row_groups):
            table: pa.Table = file.read_row_group(group)  # pyright: ignore[reportUnknownMemberType]
            for row in table.to_pylist():
                number += 1
                yield f"row {number}", row
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a value that Python has no type for
        raise InvalidInput(f"the file is not readable Parquet: {error}", field=field) from error
