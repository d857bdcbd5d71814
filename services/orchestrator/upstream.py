"""Calls to the generator and the reward service, patient, for a bounded time, with one that is down or starting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from services.contracts.checkpoints import PolicyInfo, PolicySpec
from services.contracts.errors import PolicyMismatch, RatchetError, SwapFailed, Unavailable, UpstreamFailed
from services.contracts.layout import version_of
from services.contracts.recipes import Recipe
from services.contracts.scores import ScorerInfo, ScorerSpec
from services.orchestrator.settings import OrchestratorSettings
from services.platform.http import ServiceClient
from services.platform.jobs import JobContext
from services.platform.logs import get_logger

log = get_logger(__name__)
T = TypeVar("T")


class Upstream:
    """The generator and the reward service, as the job handlers use them.

    Args:
        generator: Client of the generator, without retries of its own: jobs have theirs, and show that they wait.
        reward: Client of the reward service, likewise.
    """

    def __init__(self, generator: ServiceClient, reward: ServiceClient, settings: OrchestratorSettings) -> None:
        self.generator = generator
        self.reward = reward
        self.settings = settings

    async def patiently(self, context: JobContext, call: Callable[[], Awaitable[T]]) -> T:
        """Do a call; while its service is down, starting or overloaded, wait and try again, saying so in the progress.

        Raises:
            RatchetError: any other problem at once, a failed swap too (each costs the traffic a pause, so only the
                job's attempts repeat it); the last one when `wait_seconds` are over.
        """
        deadline = time.monotonic() + self.settings.wait_seconds
        waiting = False
        while True:
            try:
                answer = await call()
            except RatchetError as error:
                pause = max(self.settings.wait_pause_seconds, error.retry_after_seconds or 0.0)
                if isinstance(error, SwapFailed) or not error.retryable or time.monotonic() + pause > deadline:
                    raise
                if not waiting:
                    log.warning("waiting_for_service", problem=error.detail)
                waiting = True
                context.progress(waiting=error.detail)
                await asyncio.sleep(pause)
            else:
                if waiting:
                    context.progress(waiting=None)
                return answer

    async def policy(self, context: JobContext) -> PolicyInfo:
        """What the generator serves."""
        return await self.patiently(context, lambda: self.generator.call("GET", "/v1/policy", answer=PolicyInfo))

    async def serve_policy(self, context: JobContext, folder: str, recipe: Recipe, *, trial: bool) -> PolicyInfo:
        """Make the generator serve exactly this checkpoint; a no-op when it does. A cold start takes minutes.

        Raises:
            RatchetError: the checkpoint was refused, or does not prove itself; `PolicyMismatch` when the generator says
                it serves something else.
        """
        return await self.patiently(context, lambda: self.put_policy(folder, recipe, trial=trial))

    async def put_policy(self, folder: str, recipe: Recipe, *, trial: bool) -> PolicyInfo:
        """One `PUT /v1/policy`, without patience."""
        spec = PolicySpec(
            checkpoint=folder,
            trial=trial,
            trial_traffic=recipe.generator.trial_traffic,
            # Another run's model, of another shape, may be what is served now.
            allow_restart=True,
        )
        info = await self.generator.call(
            "PUT", "/v1/policy", body=spec, answer=PolicyInfo, timeout_seconds=self.settings.policy_seconds
        )
        if info.state in ("starting", "swapping"):
            raise Unavailable(f"the generator is {info.state}: {info.detail or 'no detail given'}")
        if info.state != "serving" or info.version != version_of(folder) or info.trial is not trial:
            raise PolicyMismatch(
                f"the generator was told to serve {version_of(folder)} (trial: {trial}) and says it is "
                f"{info.state} with {info.version} (trial: {info.trial}): {info.detail or 'no detail given'}"
            )
        return info

    async def load_scorer(self, context: JobContext, name: str, spec: ScorerSpec) -> ScorerInfo:
        """Make the reward service hold this scorer under this name; a no-op when it does."""
        info = await self.patiently(
            context,
            lambda: self.reward.call(
                "PUT", f"/v1/scorers/{name}", body=spec, answer=ScorerInfo,
                timeout_seconds=self.settings.scorer_load_seconds,
            ),
        )  # fmt: skip
        if info.revision != version_of(spec.checkpoint):
            raise UpstreamFailed(
                f"the reward service was told to load {version_of(spec.checkpoint)} as {name!r} and "
                f"loaded {info.revision}"
            )
        return info
