"""Watches the engine: its process ending, and its silence. Its own progress is what liveness means."""

from __future__ import annotations

import asyncio

from services.generator import metrics
from services.generator.policy import PolicyServer
from services.generator.settings import GeneratorSettings
from services.platform.logs import get_logger

log = get_logger(__name__)

STALE_FACTOR = 5.0
"""Watcher rounds that may be missed before the service calls itself dead."""


class Watcher:
    """One endless round: is the engine there, does it answer? `policy.recover` when not."""

    def __init__(self, policy: PolicyServer, settings: GeneratorSettings) -> None:
        self._policy = policy
        self._settings = settings
        self._beat = 0.0
        self._missed = 0

    async def run(self) -> None:
        """Watch until cancelled. Notices an ended process at once, a silent one after its deadline."""
        loop = asyncio.get_running_loop()
        while True:
            self._beat = loop.time()
            try:
                await self._round()
            except Exception:
                log.exception("watch_round_failed")
                await asyncio.sleep(self._settings.generator_health_interval_seconds)

    async def dead(self) -> str | None:
        """Why this service should be restarted; None while the watcher makes progress."""
        round_seconds = (
            self._settings.generator_health_interval_seconds + self._settings.generator_health_deadline_seconds
        )
        age = asyncio.get_running_loop().time() - self._beat
        if age > round_seconds * STALE_FACTOR:
            return f"the engine's watcher has made no round for {age:.0f} s; a round takes {round_seconds:g} s at most"
        return None

    async def _round(self) -> None:
        policy, settings = self._policy, self._settings
        engine = policy.engine
        if engine is None or not policy.steady:
            self._missed = 0
            await asyncio.sleep(settings.generator_health_interval_seconds / 4)
            return
        try:
            async with asyncio.timeout(settings.generator_health_interval_seconds):
                await engine.died.wait()
        except TimeoutError:
            pass
        if engine is not policy.engine or not policy.steady:
            return
        if engine.died.is_set():
            metrics.READY.set(0)
            policy.recover(f"vLLM ended; the last lines of its log:\n{engine.tail()}")
            return
        if await engine.client.healthy(settings.generator_health_deadline_seconds):
            self._missed, policy.silent = 0, None
        elif engine is policy.engine and policy.steady:
            self._missed += 1
            missed = f"vLLM missed {self._missed} health checks in a row"
            policy.silent = missed
            log.warning("engine_silent", missed=self._missed)
            if self._missed >= settings.generator_health_failures:
                self._missed = 0
                policy.recover(f"{missed}; the last lines of its log:\n{engine.tail()}")
        metrics.READY.set(policy.unready() is None)
