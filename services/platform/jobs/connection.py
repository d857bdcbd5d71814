"""The connection to Redis, with the settings that redis-py's defaults get wrong for us."""

from __future__ import annotations

from collections.abc import Callable

from redis.asyncio import Redis

# `redis.retry.Retry`, its synchronous twin, is accepted by the async client too and then never retries.
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff

from services.contracts.errors import InvalidInput

SOCKET_TIMEOUT_SECONDS = 10.0
"""Above the longest blocking read (1 s) and a slow fsync; redis-py's own 5 s equals common block times and raises."""

CONNECT_TIMEOUT_SECONDS = 3.0
"""A server on the same network answers in milliseconds."""

RETRIES = 3
"""Bridges a dropped connection, not an outage. Safe: every script of the queue may be sent twice."""


async def connect(url: str) -> Redis:
    """A client for the queue. No connection is made yet, so a service may start before Redis does.

    Raises:
        InvalidInput: `url` is no Redis URL.
    """
    # redis-py declares the keyword arguments of `from_url` without types.
    from_url: Callable[..., Redis] = getattr(Redis, "from_url")  # noqa: B009
    try:
        return from_url(
            url,
            decode_responses=True,
            protocol=2,
            socket_timeout=SOCKET_TIMEOUT_SECONDS,
            socket_connect_timeout=CONNECT_TIMEOUT_SECONDS,
            socket_keepalive=True,
            retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), RETRIES),
        )
    except ValueError as error:
        raise InvalidInput(
            f"redis_url: {error}. Write it as redis://[:password@]host:port/db (set RATCHET_REDIS_URL).",
            field="redis_url",
        ) from error
