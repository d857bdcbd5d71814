"""Python client of the four services.

    from ratchet.client import RatchetClient

    with RatchetClient.from_stack() as client:          # the stack of `ratchet up`; or from_env(), or URLs
        prompts = client.upload_dataset("prompts.jsonl")
        ...

`RatchetClient` blocks, for scripts and notebooks; `AsyncRatchetClient` has the same methods as coroutines.
"""

from ratchet.client.asynchronous import AsyncRatchetClient
from ratchet.client.chat import ChatAnswer
from ratchet.client.connection import Connection
from ratchet.client.synchronous import RatchetClient

__all__ = ["AsyncRatchetClient", "ChatAnswer", "Connection", "RatchetClient"]
