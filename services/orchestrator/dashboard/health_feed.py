"""How the services are, asked while somebody looks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from services.contracts.health import ServiceHealth
from services.orchestrator.dashboard.feed import Feed


class HealthFeed(Feed):
    """All services. No event tells that one is gone, so they are asked at every tick.

    Args:
        look: Asks them all, within its own deadline.
    """

    def __init__(self, look: Callable[[], Awaitable[tuple[ServiceHealth, ...]]]) -> None:
        super().__init__("services")
        self.health: tuple[ServiceHealth, ...] = ()
        self._look = look

    async def look(self) -> None:
        """Ask them."""
        self.health = await self._look()

    async def follow(self) -> None:
        """Nothing tells."""
        await asyncio.Event().wait()
