"""Readers of training data: rows as conversations, each broken line named with its number and what is wrong with it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from services.contracts.conversations import Message
from services.contracts.errors import InvalidInput

SHOWN_ERRORS = 5
"""Broken lines named in the error; the rest are counted."""

Conversation = tuple[Message, ...]
_MESSAGES = TypeAdapter(tuple[Message, ...])


@dataclass(frozen=True)
class Demonstration:
    """A conversation to imitate. `trained` of its last messages are the completion; None: every assistant turn."""

    messages: Conversation
    trained: int | None = None


@dataclass(frozen=True)
class Preference:
    """Two whole conversations that share a prompt."""

    chosen: Conversation
    rejected: Conversation


class _Broken(ValueError):
    """What is wrong with one row."""


def read_demonstrations(data: bytes, path: str) -> list[Demonstration]:
    """Rows for SFT: `messages`, or `prompt` and `completion` (text or messages), or `question` and `answer`.

    Raises:
        InvalidInput: a line that is not JSON or not such a row, or no row at all. Nothing is skipped.
    """
    return _read(data, path, _demonstration)


def read_preferences(data: bytes, path: str) -> list[Preference]:
    """Rows for a reward model: TRL's `prompt` (or none), `chosen`, `rejected`, as messages or text.

    Raises:
        InvalidInput: as above; also when chosen and rejected are the same.
    """
    return _read(data, path, _preference)


def _read(data: bytes, path: str, parse: Any) -> list[Any]:
    rows: list[Any] = []
    errors: list[str] = []
    for number, row in _rows(data, path):
        try:
            if isinstance(row, _Broken):
                raise row
            rows.append(parse(row))
        except _Broken as error:
            errors.append(f"line {number}: {error}")
    if errors:
        more = f"; and {len(errors) - SHOWN_ERRORS} more" if len(errors) > SHOWN_ERRORS else ""
        raise InvalidInput(
            f"{path}: {'; '.join(errors[:SHOWN_ERRORS])}{more}. Mend or remove these lines and upload the file again; "
            "training data is never skipped silently",
            field="data",
        )
    if not rows:
        raise InvalidInput(f"{path} has no rows; training needs at least one", field="data")
    return rows


def _rows(data: bytes, path: str) -> Iterator[tuple[int, Any]]:
    if data[:4] == b"PAR1":
        try:
            table = pq.read_table(io.BytesIO(data))
        except pa.ArrowException as error:
            raise InvalidInput(f"{path} is not a readable Parquet file: {error}", field="data") from error
        yield from enumerate(table.to_pylist(), start=1)
        return
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield number, _Broken(f"not UTF-8 ({error.reason} at byte {error.start})")
        except json.JSONDecodeError as error:
            yield number, _Broken(f"not JSON ({error.msg} at column {error.colno})")


def _demonstration(row: Any) -> Demonstration:
    found = _object(row)
    if found.get("messages") is not None:
        messages = _messages(found, "messages")
        if not any(message.role == "assistant" for message in messages):
            raise _Broken("messages has no assistant turn, so there is nothing to imitate")
        return Demonstration(messages)
    for prompt, completion in (("prompt", "completion"), ("question", "answer")):
        if found.get(prompt) is not None and found.get(completion) is not None:
            start = _turns(found, prompt, "user")
            end = _turns(found, completion, "assistant")
            if end[-1].role != "assistant":
                raise _Broken(f"{completion} must end with the assistant's turn, not {end[-1].role!r}")
            return Demonstration(start + end, trained=len(end))
    raise _Broken(
        f"has the fields {sorted(found)}; needed are messages, or prompt and completion, or question and answer"
    )


def _preference(row: Any) -> Preference:
    found = _object(row)
    missing = [name for name in ("chosen", "rejected") if found.get(name) is None]
    if missing:
        raise _Broken(f"has no {' and no '.join(missing)}; needed are prompt, chosen and rejected")
    prompt = _turns(found, "prompt", "user") if found.get("prompt") is not None else ()
    chosen = prompt + _turns(found, "chosen", "assistant")
    rejected = prompt + _turns(found, "rejected", "assistant")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if side[-1].role != "assistant":
            raise _Broken(f"{name} must end with the assistant's turn, not {side[-1].role!r}")
        if len(side) < 2:
            raise _Broken(f"{name} has no prompt before the assistant's turn; give the field prompt")
    if chosen == rejected:
        raise _Broken("chosen and rejected are the same")
    return Preference(chosen, rejected)


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise _Broken(f"is {type(row).__name__}, not a JSON object")
    return row


def _turns(row: dict[str, Any], name: str, role: str) -> Conversation:
    value = row[name]
    if isinstance(value, str):
        if not value.strip():
            raise _Broken(f"{name} is empty")
        return (Message.model_validate({"role": role, "content": value}),)
    return _messages(row, name)


def _messages(row: dict[str, Any], name: str) -> Conversation:
    try:
        messages = _MESSAGES.validate_python(row[name])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in (name, *first["loc"]))
        raise _Broken(f"{place}: {first['msg']}") from error
    if not messages:
        raise _Broken(f"{name} is empty")
    for index, message in enumerate(messages):
        if not message.content.strip():
            raise _Broken(f"{name}.{index} ({message.role}) is empty")
    return messages
