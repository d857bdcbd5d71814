"""The body of an event stream, without Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import cast

from services.contracts.jobs import Event
from services.orchestrator.events import KEEPALIVE, event_lines
from services.platform.jobs import EventStream


class HangingStream:
    """A stream whose Redis has stopped answering."""

    async def follow(self, topic: str, after: str, *, stop: asyncio.Event) -> AsyncGenerator[Event, None]:
        await asyncio.Event().wait()
        yield Event(id="1-0", at=0.0, type="never", topic=topic)


async def test_a_stream_ends_with_the_service_even_when_redis_hangs() -> None:
    stop = asyncio.Event()
    stream = cast(EventStream, HangingStream())
    lines = event_lines(stream, "r", "0", stop=stop, keepalive_seconds=60)
    assert await anext(lines) == KEEPALIVE
    end = asyncio.ensure_future(anext(lines, "end"))
    await asyncio.sleep(0)
    stop.set()
    assert await asyncio.wait_for(end, 5) == "end"
