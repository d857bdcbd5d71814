"""Bearer token on control routes, compared in constant time."""

from __future__ import annotations

import hmac
from collections.abc import Callable

from fastapi import Request
from fastapi.security import HTTPBearer
from pydantic import SecretStr

from services.contracts.errors import Unauthorized

bearer_scheme = HTTPBearer(auto_error=False, description="The stack's control token (RATCHET_TOKEN).")


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
                "this route needs the header 'Authorization: Bearer <token>'; the token is RATCHET_TOKEN of the stack "
                "('ratchet up' keeps it in .ratchet/token)",
                field="authorization",
            )
        if not hmac.compare_digest(given.strip().encode(), expected):
            raise Unauthorized("the bearer token is not the stack's token (RATCHET_TOKEN)", field="authorization")

    return check
