"""Which browser is which: an anonymous signed cookie for each, so that a page belongs to the browser it is made for."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping, MutableMapping
from typing import Any

from pydantic import SecretStr

COOKIE = "ratchet_browser"
_SCOPE_KEY = "ratchet.browser"


class Browsers:
    """Signed names of browsers: `id.signature`, signed with a key that is derived from the token.

    They say nothing of who is in front of it and allow nothing. They outlive a restart of the orchestrator, so that
    its pages come back by themselves.
    """

    def __init__(self, token: SecretStr) -> None:
        self._key = hmac.digest(token.get_secret_value().encode(), b"ratchet dashboard browser", hashlib.sha256)

    def new(self) -> str:
        """Cookie of a browser that has none."""
        name = secrets.token_urlsafe(16)
        return f"{name}.{self._signature(name)}"

    def of(self, cookies: Mapping[str, str]) -> str | None:
        """The browser that sent the cookies; None without a cookie that we signed."""
        name, dot, signature = cookies.get(COOKIE, "").rpartition(".")
        if not dot or not hmac.compare_digest(signature.encode(), self._signature(name).encode()):
            return None
        return name

    def _signature(self, name: str) -> str:
        return hmac.new(self._key, name.encode(), hashlib.sha256).hexdigest()


def mark(scope: MutableMapping[str, Any], browser: str | None) -> None:
    """Say in a connection's scope whose it is."""
    scope[_SCOPE_KEY] = browser


def browser_of(scope: Mapping[str, Any]) -> str | None:
    """Whose connection it is; None: of no browser that we know."""
    return scope.get(_SCOPE_KEY)
