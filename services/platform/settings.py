"""Settings every service has. Each service adds its own; all come from the environment, none has a default secret."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

MIN_TOKEN_CHARACTERS = 16
"""A shorter token is guessable; `ratchet up` makes one of 43 characters."""


class ServiceSettings(BaseSettings):
    """Settings common to the four services. Variables are prefixed `RATCHET_`; unknown ones are not read."""

    # Without hide_input_in_errors the error for any missing variable prints all that are set, the token among them.
    model_config = SettingsConfigDict(
        env_prefix="RATCHET_", extra="ignore", frozen=True, hide_input_in_errors=True, env_parse_none_str="null"
    )

    token: SecretStr = Field(description="Bearer token of the control routes. There is no default: set RATCHET_TOKEN.")
    store_url: str = Field(description="Artifact store: a folder, or an fsspec URL such as s3://bucket/ratchet.")
    redis_url: str = Field(default="redis://127.0.0.1:6379/0")
    host: str = Field(default="127.0.0.1", description="Address the service listens on.")
    port: int = Field(default=0, ge=0, le=65535)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"
    shutdown_grace_seconds: int = Field(
        default=10, ge=1, description="Open connections get this long after SIGTERM; endless streams end at once."
    )

    @field_validator("token")
    @classmethod
    def _long_enough(cls, value: SecretStr) -> SecretStr:
        if len(value.get_secret_value()) < MIN_TOKEN_CHARACTERS:
            raise ValueError(
                f"RATCHET_TOKEN must have at least {MIN_TOKEN_CHARACTERS} characters; make one with: "
                "python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )
        return value

    @field_validator("store_url")
    @classmethod
    def _absolute(cls, value: str) -> str:
        return value if "://" in value else str(Path(value).resolve())


def known_variables() -> set[str]:
    """Variables that some service reads, found in the sources: importing the services would load torch."""
    names: set[str] = set()
    for file in Path(__file__).parents[1].glob("*/settings.py"):
        for node in ast.walk(ast.parse(file.read_text(), filename=str(file))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Settings"):
                names |= {
                    f"RATCHET_{field.target.id.upper()}"
                    for field in node.body
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                }
    return names


Settings = TypeVar("Settings", bound=ServiceSettings)


def settings_from_environment(kind: type[Settings]) -> Settings:
    """A service's settings. Exits 2 with a line for each variable that is missing or wrong; none shows its value."""
    try:
        return kind()  # pyright: ignore[reportCallIssue]  # required values come from the environment
    except SettingsError as error:  # a list or table that is not JSON; it names the field
        print(f"{error} (written as JSON in the variable)", file=sys.stderr)
        raise SystemExit(2) from None
    except ValidationError as error:
        for item in error.errors(include_input=False):
            name, field = str(item["loc"][0]), kind.model_fields.get(str(item["loc"][0]))
            about = f" ({field.description})" if field is not None and field.description else ""
            told = "is not set" if item["type"] == "missing" else item["msg"].removeprefix("Value error, ")
            print(f"RATCHET_{name.upper()}: {told}{about}", file=sys.stderr)
        raise SystemExit(2) from None
