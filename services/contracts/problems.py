"""RFC 9457 problem details: the one shape of every error answer."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

PROBLEM_MEDIA_TYPE = "application/problem+json"


class FieldError(BaseModel):
    """One wrong field of a request."""

    model_config = ConfigDict(frozen=True)

    field: str = Field(description="Dotted name of the field, as sent.")
    detail: str = Field(description="What is wrong with it and what is allowed.")


class Problem(BaseModel):
    """RFC 9457 problem details. Readers tolerate unknown members, as the RFC asks."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str = Field(default="internal", description="Stable machine-readable code of the error.")
    field: str | None = Field(default=None, description="The field at fault, when there is one.")
    instance: str | None = Field(default=None, description="The request id, to find it in the logs.")
    errors: tuple[FieldError, ...] = Field(default=(), description="Every wrong field, when there are several.")
