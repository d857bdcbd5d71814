"""Which prompts an iteration draws, and the seeds of its sampling. Pure, and the same for every run of a recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

SEED_BITS = 31


def derive_seed(seed: int, purpose: Literal["sample", "evaluate", "pairs"], iteration: int = 0) -> int:
    """A seed for one purpose, below 2^31. It does not depend on the run's name or the size of chunks."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{iteration}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % (1 << SEED_BITS)


def draw_prompts(ids: Sequence[str], count: int, iteration: int, seed: int) -> list[str]:
    """Ids of the prompts of an iteration (from 1), in order.

    Iterations draw fresh prompts until the pool is used up; then it is shuffled anew. No prompt comes twice in one
    iteration. The order depends on the seed and the ids only, not on the order of the file.

    Raises:
        ValueError: the pool has fewer than `count` prompts.
    """
    if count > len(ids):
        raise ValueError(f"cannot draw {count} different prompts from {len(ids)}")
    epoch, waiting, picked = 0, _shuffled(ids, seed, 0), list[str]()
    for _ in range(iteration):
        picked = waiting[:count]
        waiting = waiting[count:]
        while len(picked) < count:
            epoch += 1
            taken = set(picked)
            fresh = _shuffled(ids, seed, epoch)
            # Prompts of this iteration wait until the end of the new order.
            waiting = [id for id in fresh if id not in taken] + [id for id in fresh if id in taken]
            missing = count - len(picked)
            picked, waiting = [*picked, *waiting[:missing]], waiting[missing:]
    return picked


def _shuffled(ids: Sequence[str], seed: int, epoch: int) -> list[str]:
    return sorted(ids, key=lambda id: hashlib.sha256(f"{seed}/prompts/{epoch}/{id}".encode()).digest())
