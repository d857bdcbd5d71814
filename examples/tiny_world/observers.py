"""What watches the demo while it runs: the memory of all processes together, and a user's requests from outside."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import psutil

from examples.tiny_world.report import Traffic
from ratchet.client import RatchetClient
from ratchet.local.stack import LocalStack
from services.contracts.errors import RatchetError

MEMORY_INTERVAL_SECONDS = 3.0
"""Reading the PSS of a dozen processes costs some tens of milliseconds of one core."""
TRAFFIC_INTERVAL_SECONDS = 1.5
"""Often enough to meet every swap, seldom enough not to slow the loop."""


class Background:
    """A thread that does something at intervals between enter and exit."""

    interval = 1.0

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=type(self).__name__, daemon=True)

    def _loop(self) -> None:
        while not self._stop.wait(self.interval):
            self.once()

    def once(self) -> None:
        """One round."""
        raise TypeError(f"{type(self).__name__} has to say what it does")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(60)


class MemorySampler(Background):
    """Largest sum of the proportional set sizes (PSS) of all processes of the stack and of the demo itself, bytes."""

    interval = MEMORY_INTERVAL_SECONDS

    def __init__(self, stack: LocalStack) -> None:
        super().__init__()
        self._stack = stack
        self.peak_bytes = 0

    def once(self) -> None:
        """Take one sample; a process that ends meanwhile, or a stack that stops, is no error."""
        try:
            total = sum(usage.pss_bytes for usage in self._stack.processes())
            total += psutil.Process(os.getpid()).memory_full_info().pss
        except (psutil.Error, RatchetError, OSError):
            return
        self.peak_bytes = max(self.peak_bytes, total)


class OutsideTraffic(Background):
    """A user who keeps chatting with the policy while it is trained and swapped. Counts what fails: nothing may."""

    interval = TRAFFIC_INTERVAL_SECONDS

    def __init__(self, client: RatchetClient, prompts: Sequence[str]) -> None:
        super().__init__()
        self._client = client
        self._prompts = itertools.cycle(prompts)
        self._requests = 0
        self._failed = 0
        self._slowest = 0.0
        self._versions: list[str] = []
        self._swaps: dict[int, float] = {}

    @property
    def swap_seconds(self) -> tuple[float, ...]:
        """Length of each swap seen: gate closed until gate open, seconds."""
        return tuple(seconds for _, seconds in sorted(self._swaps.items()))

    def once(self) -> None:
        """One chat request, and a look at the served policy."""
        began = time.monotonic()
        self._requests += 1
        try:
            version = self._client.generate(next(self._prompts), max_tokens=16, temperature=0.7)[0].policy_version
            if version and version not in self._versions:
                self._versions.append(version)
            policy = self._client.policy()
            if policy.swaps and policy.last_swap_seconds is not None:
                self._swaps[policy.swaps] = policy.last_swap_seconds
        except RatchetError:
            self._failed += 1
        self._slowest = max(self._slowest, time.monotonic() - began)

    def result(self) -> Traffic:
        """The count."""
        return Traffic(self._requests, self._failed, self._slowest, tuple(self._versions))
