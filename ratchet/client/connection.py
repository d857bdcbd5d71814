"""Where the services are, and the token: given, from the environment, or from a local stack."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import stamina.instrumentation
from pydantic import SecretStr

from services.contracts.errors import InvalidInput, NotFound, Unauthorized
from services.platform.http import ServiceClient

ENVIRONMENT = {
    "orchestrator": "RATCHET_ORCHESTRATOR_URL", "generator": "RATCHET_GENERATOR_URL",
    "reward": "RATCHET_REWARD_URL", "trainer": "RATCHET_TRAINER_URL",
}  # fmt: skip
ALIAS = "RATCHET_URL"
"""Short for RATCHET_ORCHESTRATOR_URL."""

# A person at a terminal is told when the retries are spent, not at each one. (Services do not import this package.)
stamina.instrumentation.set_on_retry_hooks([])


@dataclass(frozen=True)
class Connection:
    """URLs of the services (None: not reachable from here), the control token, and the store's URL."""

    orchestrator: str | None = None
    generator: str | None = None
    reward: str | None = None
    trainer: str | None = None
    token: SecretStr | None = None
    store_url: str | None = None

    @classmethod
    def from_stack(cls, folder: str | Path = ".ratchet") -> Connection:
        """Of the stack that `ratchet up` runs. Raises NotFound when none runs there."""
        from ratchet.local.records import StackFolder

        files = StackFolder(folder)
        record = files.read()
        if record is None or not files.running:
            raise NotFound(
                f"no stack is running in {files.path}. Start one with 'ratchet up -d', give --dir, or set {ALIAS} "
                "(and RATCHET_TOKEN) to use a remote one"
            )
        token = files.saved_token()
        return cls(
            **{name: record.url(name) for name in ENVIRONMENT},
            token=SecretStr(token) if token else None,
            store_url=record.store_url,
        )

    @classmethod
    def from_environment(cls) -> Connection | None:
        """From RATCHET_URL, RATCHET_GENERATOR_URL, … and RATCHET_TOKEN; None when no URL is set."""
        urls = {name: os.environ.get(variable) or None for name, variable in ENVIRONMENT.items()}
        urls["orchestrator"] = os.environ.get(ALIAS) or urls["orchestrator"]
        if not any(urls.values()):
            return None
        for name, url in urls.items():
            if url and not url.startswith(("http://", "https://")):
                raise InvalidInput(f"{url!r} is not a URL; it starts with http:// or https://", field=ENVIRONMENT[name])
        token = os.environ.get("RATCHET_TOKEN")
        return cls(
            **urls, token=SecretStr(token) if token else None, store_url=os.environ.get("RATCHET_STORE_URL") or None
        )

    @classmethod
    def find(cls, folder: str | Path = ".ratchet") -> Connection:
        """From the environment when it names a URL, else from the local stack."""
        return cls.from_environment() or cls.from_stack(folder)

    def service(self, name: str) -> ServiceClient:
        """A client of one service. Raises NotFound when its URL is not known."""
        url: str | None = getattr(self, name)
        if url is None:
            raise NotFound(f"the URL of the {name} is not known; set {ENVIRONMENT[name]}", field=ENVIRONMENT[name])
        return ServiceClient(name, url, self.token)

    def require_token(self, what: str) -> None:
        """Raises Unauthorized before anything is sent when there is no token."""
        if self.token is None:
            raise Unauthorized(f"{what} needs the stack's token; set RATCHET_TOKEN", field="RATCHET_TOKEN")
