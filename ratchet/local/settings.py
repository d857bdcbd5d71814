"""What a local stack is told, and which variables its services know."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

import services.contracts
from ratchet.local.records import SERVICES
from services.contracts.errors import InvalidInput
from services.contracts.model import Contract
from services.platform.settings import known_variables

PREFIX = "RATCHET_"
OWN_FLAGS = {
    "RATCHET_TOKEN": "set it in the environment of 'ratchet up'",
    "RATCHET_STORE_URL": "use --store",
    "RATCHET_REDIS_URL": "set REDIS_URL in the environment of 'ratchet up'",
    "RATCHET_HOST": "use --host",
    "RATCHET_PORT": "use --generator-port, --reward-port, --trainer-port, --orchestrator-port",
    **{f"RATCHET_{name.upper()}_URL": f"use --{name}-port" for name in SERVICES},
}
"""Variables the stack sets itself, and what to use instead."""


class StackSettings(Contract):
    """How a local stack is started."""

    services: tuple[str, ...] = Field(
        default=SERVICES, min_length=1, description="Which services to run; Redis always runs."
    )
    host: str = Field(default="127.0.0.1", description="Address the services listen on.")
    ports: dict[str, int] = Field(default_factory=dict, description="By process name; others get a free port.")
    store: str | None = Field(
        default=None, description="Artifact store, a folder or an fsspec URL. Default: `store` in the folder."
    )
    environment: dict[str, str] = Field(default_factory=dict, description="More variables for every service.")
    commands: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="Commands of services, instead of `python -m services.<name>` (stand-ins in tests).",
    )

    def check(self) -> None:
        """Refuse what would do nothing. Raises InvalidInput."""
        for name in self.services:
            if name not in SERVICES and name not in self.commands:
                raise InvalidInput(f"there is no service {name!r}; there are {', '.join(SERVICES)}", field="services")
        for name, port in self.ports.items():
            if name not in (*self.services, "redis"):
                raise InvalidInput(f"{name} is given port {port} but is not started", field=f"{name}-port")
            if not 1 <= port <= 65535:
                raise InvalidInput(f"{port} is not a port; 1 to 65535 are", field=f"{name}-port")
        check_variables(self.environment)


def service_root() -> Path:
    """Folder that holds the `services` package: a checkout, or site-packages."""
    assert services.contracts.__file__
    return Path(services.contracts.__file__).parents[2]


def check_variables(environment: Mapping[str, str]) -> None:
    """Refuse a RATCHET_ variable that the stack sets itself, or that no service reads. Raises InvalidInput."""
    known: set[str] | None = None
    for name, value in environment.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or "\0" in value:
            raise InvalidInput(f"{name!r} is not a name of an environment variable", field="set")
        if name in OWN_FLAGS:
            raise InvalidInput(f"{name} is set by the stack itself; {OWN_FLAGS[name]}", field="set")
        if name.startswith(PREFIX):
            known = known_variables() if known is None else known
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3)
                hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(known))}"
                raise InvalidInput(f"no service reads {name}, so setting it would do nothing; {hint}", field="set")


def parse_assignments(assignments: list[str]) -> dict[str, str]:
    """`NAME=value` as given to `--set`. Raises InvalidInput."""
    parsed: dict[str, str] = {}
    for assignment in assignments:
        name, sign, value = assignment.partition("=")
        if not sign:
            raise InvalidInput(f"{assignment!r} is not NAME=value", field="set")
        parsed[name.strip()] = value
    return parsed
