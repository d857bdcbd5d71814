"""The blocking client: the core's methods, run by an event loop in a thread of its own (so notebooks work too)."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from pydantic import SecretStr

from ratchet.client.asynchronous import MODEL_SECONDS, AsyncRatchetClient
from ratchet.client.chat import ChatAnswer
from ratchet.client.connection import Connection
from services.contracts.browsing import PairDetail, PairPage, PairQuery
from services.contracts.checkpoints import PolicyInfo
from services.contracts.conversations import Message
from services.contracts.health import ServiceHealth
from services.contracts.jobs import Event, Job
from services.contracts.judgements import Judgement, Verdict
from services.contracts.recipes import Recipe
from services.contracts.rollouts import RolloutLine, RolloutRequest
from services.contracts.runs import DatasetInfo, IterationView, RolloutPage, RunCreated, RunView, ShownIterations
from services.contracts.scores import LogprobRequest, LogprobResponse, ScoreItem, ScoreResponse, ScorerInfo, ScorerSpec
from services.contracts.training import TrainingJob, TrainingProgress, TrainingResult

Answer = TypeVar("Answer")
CLOSE_SECONDS = 5.0


class RatchetClient:
    """Calls the four services; every method is documented at `AsyncRatchetClient`. A context manager.

    Args:
        orchestrator_url, generator_url, reward_url, trainer_url: Only those that are used have to be given.
        token: The stack's token; reading needs none.
        store_url: The artifact store, when it is a local folder and models are to be put there (`stage_model`).
    """

    def __init__(
        self,
        orchestrator_url: str | None = None,
        generator_url: str | None = None,
        reward_url: str | None = None,
        trainer_url: str | None = None,
        token: SecretStr | str | None = None,
        store_url: str | None = None,
    ) -> None:
        secret = SecretStr(token) if isinstance(token, str) else token
        self._open(Connection(orchestrator_url, generator_url, reward_url, trainer_url, secret, store_url))

    def _open(self, connection: Connection) -> None:
        self.connection = connection
        self._core = AsyncRatchetClient(connection)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ratchet-client", daemon=True)
        self._thread.start()

    @classmethod
    def of(cls, connection: Connection) -> Self:
        """A client of a connection."""
        client = cls.__new__(cls)
        client._open(connection)
        return client

    @classmethod
    def from_stack(cls, folder: str | Path = ".ratchet") -> Self:
        """Of the stack that `ratchet up` runs in a folder. Raises NotFound."""
        return cls.of(Connection.from_stack(folder))

    @classmethod
    def find(cls, folder: str | Path = ".ratchet") -> Self:
        """From RATCHET_URL and RATCHET_TOKEN when set, else of the local stack."""
        return cls.of(Connection.find(folder))

    def _do(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C: the request is dropped too
            raise

    def _each(self, source: AsyncIterator[Answer]) -> Iterator[Answer]:
        async def following() -> Answer | None:
            return await anext(source, None)

        async def end() -> None:
            if close := getattr(source, "aclose", None):
                await close()

        try:
            while (item := self._do(following())) is not None:
                yield item
        finally:
            with contextlib.suppress(RuntimeError):  # the client was closed first
                self._do(end())

    def upload_dataset(
        self,
        path: str | Path,
        kind: Literal["prompts", "any"] = "prompts",
        on_error: Literal["refuse", "skip"] = "refuse",
    ) -> DatasetInfo:
        """Upload a JSONL or Parquet file; its store path is the answer's `path`."""
        return self._do(self._core.upload_dataset(path, kind, on_error))

    def create_run(self, recipe: Recipe, id: str | None = None) -> RunCreated:
        """Create a run and start it. The same id with the same recipe is one run."""
        return self._do(self._core.create_run(recipe, id))

    def run(self, id: str) -> RunView:
        """A run with its iterations, the current one live. Raises NotFound."""
        return self._do(self._core.run(id))

    def runs(self, iterations: ShownIterations = "all") -> list[RunView]:
        """All runs, newest first; with all iterations, the latest of each, or none."""
        return self._do(self._core.runs(iterations))

    def services(self) -> list[ServiceHealth]:
        """How the services are, as the orchestrator sees them."""
        return self._do(self._core.services())

    def iteration(self, id: str, iteration: int) -> IterationView:
        """One iteration of a run."""
        return self._do(self._core.iteration(id, iteration))

    def trigger(self, id: str, count: int = 1) -> RunView:
        """Ask for the next `count` iterations."""
        return self._do(self._core.trigger(id, count))

    def pause(self, id: str) -> RunView:
        """Enqueue nothing more; what runs, ends."""
        return self._do(self._core.pause(id))

    def resume(self, id: str) -> RunView:
        """Go on after a pause, a cancellation or a failure."""
        return self._do(self._core.resume(id))

    def cancel(self, id: str) -> RunView:
        """Stop what runs, within seconds."""
        return self._do(self._core.cancel(id))

    def rollback(self, id: str, to_iteration: int, reason: str) -> RunView:
        """Set the incumbent back to an earlier iteration, from the next iteration on."""
        return self._do(self._core.rollback(id, to_iteration, reason))

    def judge(self, id: str, iteration: int, judge: str, verdict: Verdict) -> Judgement:
        """Record what a judge says of a decided iteration. Raises Conflict when it said something else before."""
        return self._do(self._core.judge(id, iteration, judge, verdict))

    def pairs(
        self, id: str, iteration: int, offset: int = 0, limit: int = 50, query: PairQuery | None = None
    ) -> PairPage:
        """Preference pairs of an iteration, those that a query finds, in its order."""
        return self._do(self._core.pairs(id, iteration, offset, limit, query))

    def pair(self, id: str, iteration: int, number: int) -> PairDetail:
        """A pair among all responses it was chosen from; `PairPage.numbers` gives the numbers."""
        return self._do(self._core.pair(id, iteration, number))

    def rollouts(
        self, id: str, iteration: int, *, evaluation: bool = False, offset: int = 0, limit: int = 50
    ) -> RolloutPage:
        """Rollouts of an iteration with their rewards; of the held-out prompts with `evaluation`."""
        return self._do(self._core.rollouts(id, iteration, evaluation=evaluation, offset=offset, limit=limit))

    def events(self, id: str, after: str = "0") -> Iterator[Event]:
        """Events of a run: history after that id, then live, over restarts of the orchestrator. Endless."""
        return self._each(self._core.events(id, after))

    def all_events(self, after: str = "0") -> Iterator[Event]:
        """Changes of all runs (`run.*`, `iteration.decided`; the run is `data["run"]`), like `events`."""
        return self._each(self._core.all_events(after))

    def wait(self, id: str, timeout_seconds: float | None = None) -> RunView:
        """Wait until a run is neither queued nor running (idle, paused, failed, cancelled). Raises DeadlineExceeded."""
        return self._do(self._core.wait(id, timeout_seconds))

    def submit_job(self, job: TrainingJob) -> Job:
        """Queue a training job. The same job twice is one job."""
        return self._do(self._core.submit_job(job))

    def job(self, id: str) -> Job:
        """A training job. Raises NotFound."""
        return self._do(self._core.job(id))

    def jobs(self) -> list[Job]:
        """Training jobs, newest first."""
        return self._do(self._core.jobs())

    def cancel_job(self, id: str) -> Job:
        """A waiting job ends at once, a running one within seconds."""
        return self._do(self._core.cancel_job(id))

    def retry_job(self, id: str) -> Job:
        """Queue a failed or cancelled job again; it goes on from its last save."""
        return self._do(self._core.retry_job(id))

    def job_events(self, id: str, after: str = "0") -> Iterator[Event]:
        """Events of a training job; ends with the job."""
        return self._each(self._core.job_events(id, after))

    def wait_job(
        self,
        id: str,
        on_progress: Callable[[Job, TrainingProgress | None], None] | None = None,
        timeout_seconds: float | None = None,
    ) -> TrainingResult:
        """Wait for a training job's end."""
        return self._do(self._core.wait_job(id, on_progress, timeout_seconds))

    def policy(self) -> PolicyInfo:
        """Which policy the generator serves."""
        return self._do(self._core.policy())

    def set_policy(self, checkpoint: str, *, trial: bool = False, timeout_seconds: float = MODEL_SECONDS) -> PolicyInfo:
        """Serve a checkpoint of the store; returns when it is proven. Raises SwapFailed, CheckpointRefused."""
        return self._do(self._core.set_policy(checkpoint, trial=trial, timeout_seconds=timeout_seconds))

    def scorers(self) -> list[ScorerInfo]:
        """Scorers that serve."""
        return self._do(self._core.scorers())

    def load_scorer(self, name: str, spec: ScorerSpec) -> ScorerInfo:
        """Load, prove and serve a scorer."""
        return self._do(self._core.load_scorer(name, spec))

    def score(self, items: Sequence[ScoreItem], scorer: str = "default") -> ScoreResponse:
        """Raw rewards, `[items][responses]`."""
        return self._do(self._core.score(items, scorer))

    def logprobs(self, request: LogprobRequest) -> LogprobResponse:
        """Sum log-prob of exact responses under a scorer of kind `logprob`."""
        return self._do(self._core.logprobs(request))

    def generate(
        self,
        messages: Sequence[Message] | str,
        *,
        n: int = 1,
        temperature: float | None = None,
        max_tokens: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> list[ChatAnswer]:
        """Sample `n` answers from the served policy (chat completions)."""
        return self._do(
            self._core.generate(messages, n=n, temperature=temperature, max_tokens=max_tokens, top_p=top_p, seed=seed)
        )

    def stream(
        self,
        messages: Sequence[Message] | str,
        *,
        temperature: float | None = None,
        max_tokens: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[str]:
        """One answer, piece by piece as it is sampled."""
        return self._each(
            self._core.stream(messages, temperature=temperature, max_tokens=max_tokens, top_p=top_p, seed=seed)
        )

    def sample(self, request: RolloutRequest) -> Iterator[RolloutLine]:
        """Rollouts of many prompts, in order of completion, with token ids and log-probs."""
        return self._each(self._core.sample(request))

    def stage_model(self, folder: str | Path, field: str = "model") -> str:
        """Put a local model folder into a local store; returns `staging/…`, usable in a recipe."""
        return self._do(self._core.stage_model(folder, field))

    def close(self) -> None:
        """Close the connections and end the thread. Idempotent."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(Exception):
            self._do(self._core.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_SECONDS)
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
