"""Bearer token on control routes, compared in constant time."""

from __future__ import annotations

import hmac
from collections.abc import Callable

from fastapi import Request
from fastapi.security import HTTPBearer
from pydantic import SecretStr

from services.contracts.errors import Unauthorized

bearer_scheme = HTTPBearer(auto_error=False, description="The stack's control token (RATCHET_TOKEN).")

TOKEN_PLACE = "RATCHET_TOKEN of the stack: in .env with docker compose, in .ratchet/token with 'ratchet up'"
"""Where whoever started the stack finds the token."""


def require_token(token: SecretStr) -> Callable[[Request], None]:
    """Dependency for control routes: `dependencies=[Depends(require_token(settings.token))]`.

    Raises:
        Unauthorized: no `Authorization: Bearer …` header, or another token.
    """
    expected = token.get_secret_value().encode()

    def check(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise Unauthorized(
                f"this route needs the header 'Authorization: Bearer <token>'; the token is {TOKEN_PLACE}",
                field="authorization",
            )
        if not hmac.compare_digest(given.strip().encode(), expected):
            raise Unauthorized("the bearer token is not the stack's token (RATCHET_TOKEN)", field="authorization")

    return check
