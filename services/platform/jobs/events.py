"""Event streams: what happens in a run or job, kept for late joiners and followed live."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.contracts.errors import InvalidInput
from services.contracts.jobs import Event
from services.platform.jobs.records import Keys, encode, event_from
from services.platform.jobs.settings import DEFAULT_SETTINGS, JobSettings
from services.platform.logs import get_logger
from services.platform.metrics import EVENT_FOLLOWERS, EVENTS_PUBLISHED

log = get_logger(__name__)

BLOCK_SECONDS = 1.0
"""A follower looks at its `stop` this often."""

PAGE = 500
"""Events read at once."""

EVENT_ID = re.compile(r"\d{1,20}(-\d{1,20})?", re.ASCII)
LARGEST_ID_PART = 2**64 - 1
"""Redis refuses a larger one, which would read as Redis being away."""


class EventStream:
    """Events of every topic in Redis.

    Args:
        redis: From `connect`.
        settings: `key_prefix` and `events_kept` are used.
    """

    def __init__(self, redis: Redis, settings: JobSettings = DEFAULT_SETTINGS) -> None:
        self.redis: Any = redis
        self.settings = settings
        self.keys = Keys(settings.key_prefix)

    async def publish(
        self, topic: str, type: str, data: dict[str, Any], job_id: str | None = None, kind: str | None = None
    ) -> str:
        """Add an event; returns its id. The queue itself publishes every `job.*` event."""
        record = {"type": type, "job_id": job_id or "", "kind": kind or "", "data": encode(data)}
        kept = self.settings.events_kept
        entry = await self.redis.xadd(self.keys.events(topic), record, maxlen=kept, approximate=True)
        EVENTS_PUBLISHED.labels(type).inc()
        # With the ids of the request or job that it comes from: a run's changes are found by who asked for them.
        log.info("event_published", type=type, topic=topic, data=data)
        return entry

    async def read(self, topic: str, after: str = "0", count: int = PAGE) -> list[Event]:
        """Up to `count` events after the one with id `after`, oldest first, without waiting.

        Raises:
            InvalidInput: `after` is no event id.
        """
        return await self._read(topic, _checked(after), count, None)

    async def follow(
        self, topic: str, after: str = "0", *, stop: asyncio.Event | None = None
    ) -> AsyncGenerator[Event, None]:
        """Every event after id `after`: those kept, then those that come, until `stop` is set. Outlives an outage.

        Raises:
            InvalidInput: `after` is no event id.
        """
        last = _checked(after)
        away = False
        with EVENT_FOLLOWERS.track_inprogress():
            while stop is None or not stop.is_set():
                try:
                    events = await self._read(topic, last, PAGE, round(BLOCK_SECONDS * 1000))
                except RedisError as error:
                    if not away:
                        log.warning("redis_unreachable", doing="following events", topic=topic, error=str(error))
                    away = True
                    await _pause(stop, BLOCK_SECONDS)
                    continue
                away = False
                for event in events:
                    last = event.id
                    yield event

    async def _read(self, topic: str, after: str, count: int, block_ms: int | None) -> list[Event]:
        answer = await self.redis.xread({self.keys.events(topic): after}, count=count, block=block_ms)
        return [event_from(topic, entry, record) for _, entries in answer or () for entry, record in entries]


def _checked(after: str) -> str:
    if not EVENT_ID.fullmatch(after) or any(int(part) > LARGEST_ID_PART for part in after.split("-")):
        raise InvalidInput(
            f"Last-Event-ID {after[:60]!r} is no event id; give back the `id` of the last event seen, or 0 for all.",
            field="Last-Event-ID",
        )
    return after


async def _pause(stop: asyncio.Event | None, seconds: float) -> None:
    waiting: Awaitable[Any] = stop.wait() if stop else asyncio.sleep(seconds)
    try:
        await asyncio.wait_for(waiting, seconds)
    except TimeoutError:
        return
