"""What a worker knows of Redis' health: logs when it goes and when it is back, and how long to wait meanwhile."""

from __future__ import annotations

import time
from typing import Any

from redis.exceptions import RedisError

from services.platform.logs import get_logger
from services.platform.metrics import REDIS_OUTAGES, REDIS_REACHABLE

log = get_logger(__name__)

REDIS_ERRORS = (RedisError, OSError)
"""Everything a call to Redis can fail with, timeouts included."""

FIRST_DELAY_SECONDS = 0.1


class Outage:
    """Shared by the tasks of one worker.

    Args:
        redis: The client, to name its server in the log.
        longest_delay_seconds: Upper bound of the back-off.
        client: Who asks, as the metrics name it.
    """

    def __init__(self, redis: Any, longest_delay_seconds: float, *, client: str = "worker") -> None:
        self.server = server_of(redis)
        self.error: str | None = None
        self.healthy_since = 0.0
        self._longest = longest_delay_seconds
        self._down_at = 0.0
        self._reachable = REDIS_REACHABLE.labels(client)
        self._outages = REDIS_OUTAGES.labels(client)
        self._reachable.set(1)

    def failed(self, doing: str, error: BaseException) -> None:
        """A call failed. One line per outage, and one for each other error met in it."""
        message = f"{type(error).__name__}: {error}"
        if self.error is None:
            self._down_at = time.monotonic()
            self._outages.inc()
            self._reachable.set(0)
        if message != self.error:
            log.warning(
                "redis_unreachable", server=self.server, doing=doing, error=message, then="waiting and trying again"
            )
        self.error = message

    def over(self) -> None:
        """A call succeeded."""
        if self.error is not None:
            self.healthy_since = time.monotonic()
            log.info("redis_back", server=self.server, away_seconds=round(self.healthy_since - self._down_at, 1))
            self.error = None
            self._reachable.set(1)

    def delay_seconds(self, failures: int) -> float:
        """Back-off after so many failures in a row of one task."""
        return min(FIRST_DELAY_SECONDS * 2.0 ** min(failures - 1, 10), self._longest)


def server_of(redis: Any) -> str:
    """host:port of a client, never its password."""
    about = redis.connection_pool.connection_kwargs
    return str(about.get("path") or f"{about.get('host', '?')}:{about.get('port', '?')}")
