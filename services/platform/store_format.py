"""Was a store written by a version whose layout we can read? `FORMAT.json` at its root says so."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field, ValidationError

from services.contracts.errors import StoreError
from services.contracts.layout import FORMAT_FILE, STORE_FORMAT
from services.contracts.model import Contract

NOT_OURS = frozenset({"lost+found", ".DS_Store"})
"""What a fresh file system has of its own."""


class StoreFormat(Contract):
    """Content of `FORMAT.json`."""

    format: int = Field(ge=1, description="`layout.STORE_FORMAT` of the version that made the store.")


def is_empty(folder: Path) -> bool:
    """Whether nobody has put anything into a folder yet."""
    return all(entry.name in NOT_OURS for entry in folder.iterdir())


def check_format(folder: Path, *, adopt: bool = False) -> str | None:
    """Check that this version can read the store in a local folder; an empty one is marked as ours.

    Args:
        adopt: Mark a store without a number as ours: somebody knows that its layout is this one.

    Returns:
        What was done, None when there was nothing to do.

    Raises:
        StoreError: it was written by an older or a newer version, or is no store at all; with the remedy.
    """
    file = folder / FORMAT_FILE
    try:
        found = StoreFormat.model_validate_json(file.read_bytes()).format
    except FileNotFoundError:
        if not is_empty(folder) and not adopt:
            raise StoreError(
                f"the store has no {FORMAT_FILE} and is not empty: it was written by an older version, or by 'ratchet "
                "up', or is something else"
            ) from None
        partial = folder / f".tmp-{FORMAT_FILE}"
        partial.write_text(StoreFormat(format=STORE_FORMAT).model_dump_json() + "\n")
        os.replace(partial, file)
        return f"the store is marked as of format {STORE_FORMAT}"
    except ValidationError as error:
        raise StoreError(f"{FORMAT_FILE} of the store cannot be read: {error.errors()[0]['msg']}") from error
    if found != STORE_FORMAT:
        raise StoreError(
            f"the store has format {found}, and this version reads format {STORE_FORMAT}: it was written by "
            f"{'a newer' if found > STORE_FORMAT else 'an older'} version"
        )
    return None
