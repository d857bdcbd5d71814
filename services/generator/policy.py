"""The served policy: which checkpoint, which engine, and every change from one to the next.

One change runs at a time, as a task of its own, so that a caller who goes away stops nothing half-way. States: `empty`
-> `starting` -> `serving` <-> `swapping`; `failed` when nothing proven can be served; `asleep` -> `waking` while
somebody leases the device (`turns`). Only a proof opens the gate.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Literal, NoReturn

from services.contracts.checkpoints import PolicyInfo, PolicySpec
from services.contracts.errors import CheckpointRefused, RatchetError, SwapFailed, Unavailable
from services.generator import metrics
from services.generator.checkpoint_checks import Checkpoint, check_policy, check_swappable
from services.generator.engine import Engine
from services.generator.engine_client import EngineDescription
from services.generator.gate import RETRY_SECONDS, Gate
from services.generator.leases import Leases
from services.generator.settings import GeneratorSettings
from services.generator.swap import drain_for_change, load_proven, prove, tolerance_for
from services.platform.logs import get_logger
from services.platform.store import ArtifactStore

log = get_logger(__name__)

UNLOADED = "no policy is loaded; load one with PUT /v1/policy"
STABLE_SECONDS = 300.0
"""An engine that served this long is sound: restarts before it do not count any more."""

State = Literal["empty", "starting", "serving", "swapping", "asleep", "waking", "failed"]
StartEngine = Callable[[GeneratorSettings, Checkpoint], Coroutine[None, None, Engine]]


async def start_engine(settings: GeneratorSettings, checkpoint: Checkpoint) -> Engine:
    """Start vLLM with a checkpoint."""
    return await Engine.start(settings, checkpoint.local)


class PolicyServer:
    """Serves one proven policy at a time. `start` is replaced by tests that bring their own engine."""

    def __init__(
        self, settings: GeneratorSettings, store: ArtifactStore, gate: Gate, start: StartEngine = start_engine
    ) -> None:
        self.gate = gate
        self.leases = Leases(settings)
        self.engine: Engine | None = None
        self.description: EngineDescription | None = None
        self.state: State = "empty"
        self.current: Checkpoint | None = None
        """The last proven checkpoint; it is what a restart serves again."""
        self.detail: str | None = None
        self.silent: str | None = None
        """Why the engine is not trusted at the moment, found by the watcher."""
        self._settings = settings
        self._store = store
        self._start = start
        self._trial: PolicySpec | None = None
        self._change: asyncio.Task[None] | None = None
        self._changing_to: PolicySpec | None = None
        self._engine_starts = 0
        self._swaps = 0
        self._restarts = 0
        self._serving_since = 0.0
        self._last_swap_seconds: float | None = None
        self._deviation: float | None = None

    # --- what it is

    def info(self) -> PolicyInfo:
        """Answer of `GET /v1/policy`."""
        return PolicyInfo(
            state=self.state,
            version=self.current.version if self.current else None,
            checkpoint=self.current.folder if self.current else None,
            trial=self._trial is not None,
            model=self._settings.generator_model_name,
            engine_starts=self._engine_starts,
            engine_pid=self.engine.pid if self.engine else None,
            swaps=self._swaps,
            last_swap_seconds=self._last_swap_seconds,
            proof_deviation=self._deviation,
            detail=self.detail or (self.leases.blocked() if self.state == "empty" else None),
            lease=self.leases.view(),
        )

    def unready(self) -> str | None:
        """Why no request can be answered now; None when a proven policy is served."""
        if self.state == "serving" and self.engine and not self.engine.died.is_set() and self.silent is None:
            return None
        if self.state == "serving":
            return self.silent or "vLLM has ended; it is being restarted"
        return f"{self.state}: {self.info().detail or UNLOADED}"

    @property
    def changing(self) -> bool:
        """Whether a change is under way."""
        return self._change is not None and not self._change.done()

    @property
    def steady(self) -> bool:
        """A policy is served and nothing changes it; else the engine is the change's, or a lease's."""
        return self.state == "serving" and not self.changing

    # --- asking for a change

    async def put(self, spec: PolicySpec) -> PolicyInfo:
        """Serve this checkpoint. Asking again joins the change under way; what is served already is a no-op.

        Returns:
            With state `starting` or `swapping` when it takes longer than `generator_put_wait_seconds`.

        Raises:
            CheckpointRefused: before the engine saw anything; what was served goes on.
            SwapFailed: the message says what is served now.
            Unavailable: another change, rollouts, or a lease on the device took too long; try again.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.generator_put_wait_seconds
        patience = min(deadline, loop.time() + self._settings.generator_gate_wait_seconds)
        while self.changing or self.leases.blocked():
            if (change := self._change) is None or change.done():
                if not await self.leases.free(patience):
                    self._refuse_leased()
                continue
            joined = self._changing_to == spec
            await asyncio.wait({change}, timeout=max(0.0, deadline - loop.time()))
            if not change.done() and joined:
                return self.info()
            if not change.done():
                raise Unavailable(
                    f"a change is still under way ({self.detail}); try again", retry_after_seconds=RETRY_SECONDS
                )
            if joined:
                return self._outcome(change)
        if self._serves(spec.checkpoint):
            self._trial = spec if spec.trial else None
            self._open_gate()
            return self.info()
        change = self.begin(self._change_to(spec), spec)
        await asyncio.wait({change}, timeout=max(0.0, deadline - loop.time()))
        return self._outcome(change) if change.done() else self.info()

    def _outcome(self, change: asyncio.Task[None]) -> PolicyInfo:
        change.result()
        if self.state in ("asleep", "waking"):  # lent since; what was asked for comes back with the device
            self._refuse_leased()
        return self.info()

    def _refuse_leased(self) -> NoReturn:
        why = self.leases.blocked() or f"vLLM is {self.state}: {self.detail}"
        raise Unavailable(f"{why}; no policy can be loaded until then; try again", retry_after_seconds=RETRY_SECONDS)

    def recover(self, reason: str) -> None:
        """The engine is dead or silent: start another with the last proven policy; never beside a lease's holder."""
        if self.steady:
            self.begin(self.restart(reason))

    async def close(self) -> None:
        """Stop changing and end the engine."""
        if self._change is not None:
            self._change.cancel()
            await asyncio.gather(self._change, return_exceptions=True)
        self.gate.shut("the generator is stopping")
        await self.stop_engine()

    def _serves(self, folder: str) -> bool:
        alive = self.engine is not None and not self.engine.died.is_set()
        return self.state == "serving" and alive and self.current is not None and self.current.folder == folder

    def begin(self, change: Coroutine[None, None, None], spec: PolicySpec | None = None) -> asyncio.Task[None]:
        """Start a change; the caller has seen that none is under way."""
        self._changing_to = spec
        self._change = asyncio.create_task(self._settled(change))
        self._change.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._change

    async def settled(self, until: float) -> bool:
        """Wait for the change under way. False when it goes on at this time of the event loop's clock."""
        if (change := self._change) is not None and not change.done():
            await asyncio.wait({change}, timeout=max(0.0, until - asyncio.get_running_loop().time()))
        return not self.changing

    async def _settled(self, change: Coroutine[None, None, None]) -> None:
        """Whatever happens in a change, a half state does not outlive it."""
        try:
            await change
        except BaseException as error:
            if self.state in ("starting", "swapping", "waking"):
                self.fail(str(error) or type(error).__name__)
            raise
        finally:
            metrics.READY.set(self.unready() is None)

    # --- changes

    async def _change_to(self, spec: PolicySpec) -> None:
        before, detail = self.state, self.detail
        if before in ("empty", "failed"):
            self.state = "starting"
        self.detail = f"checking {spec.checkpoint}"
        try:
            checkpoint = await asyncio.to_thread(check_policy, self._store, spec.checkpoint)
            if before == "serving" and self.current and not spec.allow_restart:
                check_swappable(checkpoint, self.current)
        except CheckpointRefused as error:
            self.state = before
            self.detail = error.detail if before in ("empty", "failed") else detail
            raise
        self.detail = detail
        alive = self.engine is not None and not self.engine.died.is_set()
        if before == "serving" and alive and self.current and checkpoint.swappable_with(self.current):
            await self._swap(checkpoint, self.current, spec)
        else:
            await self._replace(checkpoint, spec)

    async def _swap(self, new: Checkpoint, old: Checkpoint, spec: PolicySpec) -> None:
        loop = asyncio.get_running_loop()
        why = f"the policy is being swapped from {old.version} to {new.version}"
        await self.drain_rollouts(why)
        started = loop.time()
        self.state, self.detail = "swapping", why
        self.gate.close(why)
        await self.drain()
        try:
            await self._load(new, old)
        except RatchetError as error:
            metrics.SWAPS.labels("failed").inc()
            log.error("swap_failed", new=new.version, old=old.version, reason=error.detail)
            raise await self._restore(old, new, error) from error
        self._swaps += 1
        self._last_swap_seconds = loop.time() - started
        metrics.SWAPS.labels("done").inc()
        metrics.SWAP_SECONDS.observe(self._last_swap_seconds)
        self._serve(new, spec)
        log.info(
            "swapped", new=new.version, old=old.version, seconds=self._last_swap_seconds, deviation=self._deviation
        )

    async def drain(self) -> None:
        """Let what is in flight finish, or take it back; the gate is closed already."""
        await drain_for_change(self.gate, self._settings)

    async def drain_rollouts(self, why: str) -> None:
        """Wait for the rollouts that run, with the gate open for others: none sees two policies, none is broken off.

        Raises:
            Unavailable: they ran for too long, and the gate is open again.
        """
        self.gate.close(f"{why}; it waits for running rollouts", "rollouts")
        seconds = self._settings.generator_rollout_wait_seconds
        if not await self.gate.drain(seconds, "rollouts"):
            self._open_gate()
            raise Unavailable(
                f"{len(self.gate.in_flight('rollouts'))} rollout requests still ran after {seconds:g} s "
                f"(RATCHET_GENERATOR_ROLLOUT_WAIT_SECONDS), and none is broken off ({why}); end them or try again",
                retry_after_seconds=5,
            )

    async def _load(self, new: Checkpoint, old: Checkpoint) -> None:
        assert self.engine is not None
        assert self.description is not None
        tolerance = tolerance_for(self.description.dtype, self._settings)
        proof = await load_proven(self.engine.client, new, self.description, tolerance, old)
        self._deviation = proof.largest

    async def _restore(self, old: Checkpoint, new: Checkpoint, error: RatchetError) -> SwapFailed:
        """Serve the old policy again, proven: in place, else by a restart. Returns the error for the caller."""
        told = f"swap to {new.version} failed: {error.detail}"
        try:
            await self._load(old, new)
        except RatchetError as again:
            log.error("restore_failed", old=old.version, reason=again.detail)
            try:
                await self._start_proven(old)
            except RatchetError as last:
                self.fail(f"{told}; the previous policy {old.version} could not be restored either: {last.detail}")
                return SwapFailed(self.detail or told)
        self._serve(old, self._trial)
        return SwapFailed(f"{told}. The previous policy {old.version} is restored, proven, and served")

    async def _replace(self, new: Checkpoint, spec: PolicySpec) -> None:
        """Start an engine with this checkpoint, in place of one that is dead or runs another model."""
        old = self.current if self.state == "serving" else None
        if old is not None:
            why = f"the engine is being restarted with {new.version}"
            await self.drain_rollouts(why)
            self.gate.close(why)
            await self.gate.drain(self._settings.generator_stream_drain_seconds)
        try:
            await self._start_proven(new)
        except RatchetError as error:
            told = f"vLLM could not be started with {new.version}: {error.detail}"
            if old is None:
                self.fail(told)
                raise SwapFailed(f"{told}\nNothing is served") from error
            await self.restart(told)
            served = f"{old.version} is served again" if self.state == "serving" else "nothing is served"
            raise SwapFailed(f"{told}\n{served}") from error
        self._serve(new, spec)

    async def restart(self, reason: str) -> None:
        """A change: start another engine with the last proven policy, a bounded number of times; else fail."""
        loop, settings, policy = asyncio.get_running_loop(), self._settings, self.current
        assert policy is not None
        log.error("engine_lost", reason=reason, policy=policy.version)
        metrics.ENGINE_DEATHS.inc()
        if loop.time() - self._serving_since > STABLE_SECONDS:
            self._restarts = 0
        while self._restarts < settings.generator_max_restarts:
            self._restarts += 1
            try:
                await self._start_proven(policy, why=f"restart {self._restarts} after: {reason}")
            except RatchetError as error:
                reason = error.detail
                log.error("engine_restart_failed", attempt=self._restarts, reason=reason)
                self.detail = f"restart {self._restarts} of {settings.generator_max_restarts} failed: {reason}"
                await asyncio.sleep(settings.generator_restart_backoff_seconds * 2 ** (self._restarts - 1))
                continue
            self._serve(policy, self._trial)
            return
        await self.stop_engine()
        self._restarts = 0
        self.fail(
            f"vLLM failed {settings.generator_max_restarts} restarts (RATCHET_GENERATOR_MAX_RESTARTS); the last "
            f"reason: {reason}\nMend the cause, then PUT /v1/policy again or restart the generator"
        )

    # --- steps

    async def _start_proven(self, checkpoint: Checkpoint, *, why: str | None = None) -> None:
        settings, loop = self._settings, asyncio.get_running_loop()
        started = loop.time()
        self.state = "starting"
        self.detail = f"vLLM is starting with {checkpoint.version}" + (f" ({why})" if why else "")
        self.gate.shut(self.detail)
        metrics.READY.set(0)
        await self.stop_engine()
        self._engine_starts += 1
        metrics.ENGINE_STARTS.inc()
        self.engine = engine = await self._start(settings, checkpoint)
        try:
            await engine.wait_ready(settings.generator_start_seconds)
            self.description = await engine.client.describe()
            await self._prove(checkpoint)
        except BaseException:
            await self.stop_engine()
            raise
        self._serving_since = loop.time()
        seconds = loop.time() - started
        metrics.ENGINE_START_SECONDS.observe(seconds)
        log.info("engine_proven", policy=checkpoint.version, seconds=seconds, deviation=self._deviation)

    async def _prove(self, checkpoint: Checkpoint) -> None:
        assert self.engine is not None
        assert self.description is not None
        tolerance = tolerance_for(self.description.dtype, self._settings)
        proof = await prove(self.engine.client, checkpoint, self.description, tolerance)
        self._deviation = proof.largest

    async def prove_current(self) -> None:
        """The engine still serves the last proven policy. Raises NotProven."""
        assert self.current is not None
        await self._prove(self.current)

    async def stop_engine(self) -> None:
        """End vLLM. Harmless when there is none."""
        engine, self.engine, self.silent = self.engine, None, None
        if engine is not None:
            await engine.stop(self._settings.generator_stop_seconds)

    def _serve(self, checkpoint: Checkpoint, spec: PolicySpec | None) -> None:
        self.current, self.state, self.detail = checkpoint, "serving", None
        self._trial = spec if spec and spec.trial else None
        self._open_gate()

    def serve_again(self) -> None:
        """The last policy is proven once more: serve it as before, on trial or not."""
        assert self.current is not None
        self._serve(self.current, self._trial)

    def shut_unserved(self) -> None:
        """Nothing is served, for the reason in `detail`."""
        self.gate.shut(f"no policy is served: {self.detail}" if self.detail else UNLOADED)

    def _open_gate(self) -> None:
        assert self.current is not None
        hold = self._trial is not None and self._trial.trial_traffic == "wait"
        self.gate.open(self.current.version, hold_outside=hold)

    def fail(self, reason: str) -> None:
        """Nothing proven can be served."""
        self.state, self.detail = "failed", reason
        self.shut_unserved()
