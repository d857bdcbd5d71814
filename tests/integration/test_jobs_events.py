"""Event streams against a real Redis: history, then live, and bounded."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
from redis.asyncio import Redis

from services.contracts.errors import InvalidInput
from services.platform.jobs import EventStream, JobSettings


async def until(condition: Callable[[], Awaitable[bool] | bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found if isinstance(found, bool) else await found:
            return
        assert time.monotonic() < deadline, f"did not come true within {seconds} s"
        await asyncio.sleep(0.02)


async def test_a_late_reader_gets_the_history_then_what_comes_and_can_continue(redis_client: Redis) -> None:
    events = EventStream(redis_client)
    for n in range(3):
        await events.publish("run", "run.note", {"n": n})
    stop = asyncio.Event()
    seen: list[tuple[str, int]] = []

    async def reader(after: str) -> None:
        async for event in events.follow("run", after, stop=stop):
            seen.append((event.id, event.data["n"]))

    task = asyncio.create_task(reader("0"))
    await until(lambda: len(seen) == 3)
    await events.publish("run", "run.note", {"n": 3})
    await until(lambda: len(seen) == 4)
    stop.set()
    await asyncio.wait_for(task, 5)
    assert [n for _, n in seen] == [0, 1, 2, 3]
    # What a browser does with Last-Event-ID.
    last = seen[1][0]
    assert [event.data["n"] for event in await events.read("run", last)] == [2, 3]


@pytest.mark.parametrize("after", ["$", "abc", "1-", "-1", "", "18446744073709551616", "1-18446744073709551616"])
async def test_a_last_event_id_that_is_none_is_refused(redis_client: Redis, after: str) -> None:
    with pytest.raises(InvalidInput, match="Last-Event-ID"):
        await EventStream(redis_client).read("run", after)


async def test_streams_are_bounded(redis_client: Redis) -> None:
    events = EventStream(redis_client, JobSettings(events_kept=100))
    for n in range(250):
        await events.publish("run", "run.note", {"n": n})
    kept = await events.read("run")
    # `MAXLEN ~` drops whole nodes of 100.
    assert 100 <= len(kept) <= 200
    assert kept[-1].data == {"n": 249}
