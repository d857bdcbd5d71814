"""A job's events as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from services.contracts.jobs import Event, Job
from services.platform.jobs import EventStream, JobQueue

KEEP_ALIVE_SECONDS = 15.0
"""Proxies drop a connection that is silent for 30-60 s."""
FINAL = ("job.succeeded", "job.failed", "job.cancelled")


async def job_events(
    queue: JobQueue, events: EventStream, job: Job, after: str, draining: asyncio.Event
) -> AsyncIterator[str]:
    """Events of one job after id `after`, as SSE text: those kept, then live ones, until the job is final.

    A retried job has final events in its past; the stream goes on over them.
    """
    stop = asyncio.Event()
    followed = events.follow(job.topic, after, stop=stop)
    waiting: asyncio.Task[Event] | None = None
    drained = asyncio.create_task(draining.wait())
    try:
        if job.state.final:
            last = after
            while page := await events.read(job.topic, last):
                for event in page:
                    if event.job_id == job.id:
                        yield encode(event)
                last = page[-1].id
            return
        while True:
            waiting = waiting or asyncio.ensure_future(anext(followed))
            await asyncio.wait({waiting, drained}, timeout=KEEP_ALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if drained.done():
                return
            if not waiting.done():
                yield ": keep-alive\n\n"
                continue
            event, waiting = waiting.result(), None
            if event.job_id != job.id:
                continue
            yield encode(event)
            if event.type in FINAL:
                now = await queue.get(job.id)
                if now is None or now.state.final:
                    return
    finally:
        stop.set()
        drained.cancel()
        if waiting is not None:
            waiting.cancel()


def encode(event: Event) -> str:
    """One event on the wire."""
    return f"id: {event.id}\nevent: {event.type}\ndata: {event.model_dump_json()}\n\n"
