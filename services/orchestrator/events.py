"""Events of runs: told on the run's topic and on that of all runs, and read as server-sent events."""

from __future__ import annotations

import asyncio
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from services.contracts.jobs import Event
from services.contracts.layout import ALL_RUNS
from services.platform.jobs import EventStream

KEEPALIVE = ": keep-alive\n\n"
EVENT_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "`data` is an `Event` as JSON."}
}
"""The `responses` of a route that answers with `stream_events`."""


async def tell_change(events: EventStream, run: str, type: str, data: dict[str, Any]) -> None:
    """Publish a change of a run to who follows it, and, with the run's id, to who follows all runs."""
    await events.publish(run, type, data)
    await events.publish(ALL_RUNS, type, {"run": run, **data})


def stream_events(
    request: Request, events: EventStream, topic: str, after: str, keepalive_seconds: float
) -> StreamingResponse:
    """The answer of an event route; it ends when the service shuts down."""
    lines = event_lines(
        events, topic, after, stop=request.app.state.draining.event, keepalive_seconds=keepalive_seconds
    )
    return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def event_lines(
    events: EventStream, topic: str, after: str, *, stop: asyncio.Event, keepalive_seconds: float
) -> AsyncIterator[str]:
    """The body of `text/event-stream`: `id`, `event` and `data` (the `Event` as JSON) for each event after id `after`.

    Ends when `stop` is set (the service shuts down); the reader comes back with `Last-Event-ID`.
    """
    following = events.follow(topic, after, stop=stop)
    upcoming: asyncio.Task[Event | None] | None = None
    yield KEEPALIVE  # headers and a first byte at once, so that a reader knows it is connected
    stopped = asyncio.create_task(stop.wait())
    try:
        while True:
            upcoming = upcoming or asyncio.create_task(_next(following))
            done, _ = await asyncio.wait({upcoming, stopped}, timeout=keepalive_seconds, return_when=FIRST_COMPLETED)
            if stop.is_set() and upcoming not in done:
                return  # not after the read has ended: Redis may hang
            if not done:
                yield KEEPALIVE
                continue
            event, upcoming = upcoming.result(), None
            if event is None:
                return
            yield f"id: {event.id}\nevent: {event.type}\ndata: {event.model_dump_json()}\n\n"
    finally:
        stopped.cancel()
        if upcoming is not None:
            upcoming.cancel()
            await asyncio.gather(upcoming, return_exceptions=True)
        await following.aclose()


async def _next(following: AsyncGenerator[Event, None]) -> Event | None:
    return await anext(following, None)
