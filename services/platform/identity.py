"""Does a service belong to our stack? It proves that it knows the stack's token; neither side sends the token.

Whoever asks draws a nonce, and the service answers with HMAC-SHA256 over its name and the nonce. The key is derived
from the token and is used for nothing else, so a proof is of no use on any other route.
"""

from __future__ import annotations

import hmac
import secrets

from pydantic import Field, SecretStr, ValidationError

from services.contracts.model import Contract

KEY_LABEL = b"ratchet identity v1"
NONCE_BYTES = 16
NONCE_PATTERN = rf"^[0-9a-f]{{{2 * NONCE_BYTES}}}$"


class ServiceIdentity(Contract):
    """Answer of `GET /health/identity`."""

    service: str = Field(description="Name of the service: generator, reward, trainer or orchestrator.")
    proof: str = Field(
        description="HMAC-SHA256 in hex of 'SERVICE:NONCE'; its key is HMAC-SHA256(token, 'ratchet identity v1')."
    )


def new_nonce() -> str:
    """What to ask with, once."""
    return secrets.token_hex(NONCE_BYTES)


def prove(token: SecretStr, service: str, nonce: str) -> ServiceIdentity:
    """A service's answer to a nonce."""
    key = hmac.digest(token.get_secret_value().encode(), KEY_LABEL, "sha256")
    return ServiceIdentity(service=service, proof=hmac.digest(key, f"{service}:{nonce}".encode(), "sha256").hex())


def is_proven(token: SecretStr, service: str, nonce: str, answer: bytes) -> bool:
    """Whether an answer's body is that of this service, in a stack with this token. Anything else is no."""
    try:
        given = ServiceIdentity.model_validate_json(answer)
    except ValidationError:
        return False
    expected = prove(token, service, nonce)
    return given.service == service and hmac.compare_digest(given.proof.encode(), expected.proof.encode())
