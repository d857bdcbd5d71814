"""No candidate stays on trial when nobody judges it: a run that failed, paused or was cancelled gives way.

And a generator that was restarted while no run works serves the last decided policy again: the store knows it, and
nobody else would load it until the next run.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping

from services.contracts.checkpoints import PolicyInfo
from services.contracts.errors import RatchetError
from services.orchestrator import stages
from services.orchestrator.snapshots import Snapshot
from services.orchestrator.upstream import Upstream
from services.platform.logs import get_logger

log = get_logger(__name__)

ASK_SECONDS = 5.0
"""Deadline of `GET /v1/policy`, which waits for no model."""
CANDIDATE = re.compile(r"([^/]+)/iter-\d+")


class TrialGuard:
    """Looks after the generator while no run uses it. Its calls run beside the conductor's loop, one at a time."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self._task: asyncio.Task[None] | None = None

    def look(self, shots: Mapping[str, Snapshot], *, busy: bool) -> None:
        """Start a look at the generator, unless a run uses it or a look is under way. Called each turn, cheap."""
        if busy or not shots or (self._task is not None and not self._task.done()):
            return
        self._task = asyncio.create_task(self._look(dict(shots)), name="trial guard")

    async def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _look(self, shots: Mapping[str, Snapshot]) -> None:
        try:
            info = await self.upstream.generator.call(
                "GET", "/v1/policy", answer=PolicyInfo, timeout_seconds=ASK_SECONDS
            )
            match = CANDIDATE.fullmatch(info.version or "")
            shot = shots.get(match[1]) if match and info.trial else None
            if info.state == "empty":
                shot = last_decided(shots.values())
            if shot is None or shot.plan.incumbent is None:
                return
            folder = stages.policy_folder(shot.record, shot.plan.incumbent)
            await self.upstream.put_policy(folder, shot.record.recipe, trial=False)
            log.warning(
                "trial_ended" if info.trial else "policy_served_again",
                run=shot.record.id, before=info.version, serving=folder, status=shot.plan.status,
            )  # fmt: skip
        except RatchetError as error:
            log.debug("trial_not_looked_at", problem=error.detail)  # the next sweep looks again


def last_decided(shots: Iterable[Snapshot]) -> Snapshot | None:
    """The run whose policy was the last to be decided on, by the gate or by a rollback; None when there is none."""

    def at(shot: Snapshot) -> str:
        return max(
            [record.decided_at for record in shot.decided.values()]
            + [rollback.at for rollback in shot.control.rollbacks]
        )

    return max((shot for shot in shots if shot.decided), key=at, default=None)
