"""The frozen model that every contract derives from."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Contract(BaseModel):
    """A value that crosses a boundary: immutable, and unknown keys are an error (a typo never passes silently)."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants", protected_namespaces=())


TokenIds = tuple[int, ...]
"""Token ids of one sequence, `[seq]`."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
"""A name that is safe as one path segment and as a metric label: letters, digits, `.`, `_`, `-`."""

StorePath = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$", max_length=400)]
"""A path relative to the artifact store's root. No `..`, no absolute path, no URL can match it."""
