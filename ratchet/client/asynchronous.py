"""The client's core, as coroutines. `RatchetClient` is the same for scripts and notebooks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar

import httpx_sse
from pydantic import TypeAdapter

from ratchet.client.chat import ChatAnswer, ChatRequest, as_messages, chat_answers, chat_pieces
from ratchet.client.connection import Connection
from ratchet.client.staging import stage_model
from services.contracts.browsing import PairDetail, PairPage, PairPageQuery, PairQuery
from services.contracts.checkpoints import PolicyInfo, PolicySpec
from services.contracts.conversations import Message
from services.contracts.errors import (
    DeadlineExceeded,
    InvalidInput,
    JobFailed,
    SwapFailed,
    Unavailable,
    UpstreamFailed,
)  # fmt: skip
from services.contracts.health import ServiceHealth
from services.contracts.jobs import Event, Job, JobState
from services.contracts.judgements import Judgement, Verdict
from services.contracts.recipes import Recipe
from services.contracts.rollouts import RolloutLine, RolloutRequest
from services.contracts.runs import (
    DatasetInfo,
    IterationsRequest,
    IterationView,
    RollbackRequest,
    RolloutPage,
    RunCreated,
    RunRequest,
    RunStatus,
    RunView,
    ShownIterations,
)  # fmt: skip
from services.contracts.scores import (
    LogprobRequest,
    LogprobResponse,
    ScoreItem,
    ScoreRequest,
    ScoreResponse,
    ScorerInfo,
    ScorerSpec,
)
from services.contracts.training import TrainingJob, TrainingProgress, TrainingResult
from services.platform.http import ServiceClient

Answer = TypeVar("Answer")
OUTAGES = (Unavailable, DeadlineExceeded, UpstreamFailed)
"""What a restarting service looks like from outside (ConnectionLost is an Unavailable)."""
OUTAGE_SECONDS = 300.0
"""Waiting and following go on for so long without an answer; a restart of a service takes under a minute."""
POLL_SECONDS = 0.5
UPLOAD_SECONDS = 600.0
MODEL_SECONDS = 600.0
"""Loading a model and proving it; vLLM on CPU takes up to two minutes to start."""
SILENCE_SECONDS = 60.0
"""An event stream sends a comment well before; longer silence is a dead connection."""
RUNS = TypeAdapter(list[RunView])
JOBS = TypeAdapter(list[Job])
SERVICES = TypeAdapter(list[ServiceHealth])
SCORERS = TypeAdapter(list[ScorerInfo])
FORMATS: dict[str, str] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}


class AsyncRatchetClient:
    """Calls the four services. Every method raises the error the service raised (`services.contracts.errors`)."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._services: dict[str, ServiceClient] = {}

    def _service(self, name: str) -> ServiceClient:
        if name not in self._services:
            self._services[name] = self.connection.service(name)
        return self._services[name]

    def _control(self, name: str, what: str) -> ServiceClient:
        self.connection.require_token(what)
        return self._service(name)

    # -- runs ---------------------------------------------------------------------------------------------------------

    async def upload_dataset(
        self,
        path: str | Path,
        kind: Literal["prompts", "any"] = "prompts",
        on_error: Literal["refuse", "skip"] = "refuse",
    ) -> DatasetInfo:
        """Upload a JSONL or Parquet file; its store path is the answer's `path`.

        Raises:
            InvalidInput: no such file, another format, or a broken line (named) with `on_error="refuse"`.
        """
        file = Path(path).expanduser()  # noqa: ASYNC240 - one look at a local disk
        if not file.is_file():
            raise InvalidInput(f"{file} is not a file", field="path")
        form = FORMATS.get(file.suffix.lower())
        if form is None:
            raise InvalidInput(
                f"{file.name}: the format is told by the ending; allowed are {', '.join(FORMATS)}", field="path"
            )
        answer = await self._control("orchestrator", "uploading a dataset").send(
            "POST", "/v1/datasets", content=await asyncio.to_thread(file.read_bytes), timeout_seconds=UPLOAD_SECONDS,
            params={"kind": kind, "format": form, "on_error": on_error},
            headers={"Content-Type": "application/octet-stream"},
        )  # fmt: skip
        return DatasetInfo.model_validate_json(answer.content)

    async def create_run(self, recipe: Recipe, id: str | None = None) -> RunCreated:
        """Create a run and start it. The same id with the same recipe is one run."""
        request = RunRequest(recipe=recipe, id=id)
        return await self._control("orchestrator", "creating a run").call(
            "POST", "/v1/runs", answer=RunCreated, body=request
        )

    async def run(self, id: str) -> RunView:
        """A run with its iterations, the current one live. Raises NotFound."""
        return await self._service("orchestrator").call("GET", f"/v1/runs/{id}", answer=RunView)

    async def runs(self, iterations: ShownIterations = "all") -> list[RunView]:
        """All runs, newest first; with all iterations, the latest of each, or none."""
        answer = await self._service("orchestrator").send("GET", "/v1/runs", params={"iterations": iterations})
        return RUNS.validate_json(answer.content)

    async def services(self) -> list[ServiceHealth]:
        """How the services are, as the orchestrator sees them."""
        return SERVICES.validate_json((await self._service("orchestrator").send("GET", "/v1/services")).content)

    async def iteration(self, id: str, iteration: int) -> IterationView:
        """One iteration of a run."""
        return await self._service("orchestrator").call(
            "GET", f"/v1/runs/{id}/iterations/{iteration}", answer=IterationView
        )

    async def trigger(self, id: str, count: int = 1) -> RunView:
        """Ask for the next `count` iterations."""
        body = IterationsRequest(count=count)
        service = self._control("orchestrator", "triggering iterations")
        return await service.call("POST", f"/v1/runs/{id}/iterations", answer=RunView, body=body)

    async def pause(self, id: str) -> RunView:
        """Enqueue nothing more; what runs, ends."""
        return await self._change(id, "pause")

    async def resume(self, id: str) -> RunView:
        """Go on after a pause, a cancellation or a failure."""
        return await self._change(id, "resume")

    async def cancel(self, id: str) -> RunView:
        """Stop what runs, within seconds."""
        return await self._change(id, "cancel")

    async def _change(self, id: str, verb: str) -> RunView:
        return await self._control("orchestrator", f"to {verb} a run").call(
            "POST", f"/v1/runs/{id}/{verb}", answer=RunView
        )

    async def rollback(self, id: str, to_iteration: int, reason: str) -> RunView:
        """Set the incumbent back to an earlier iteration, from the next iteration on."""
        body = RollbackRequest(to_iteration=to_iteration, reason=reason)
        service = self._control("orchestrator", "rolling back")
        return await service.call("POST", f"/v1/runs/{id}/rollback", answer=RunView, body=body)

    async def judge(self, id: str, iteration: int, judge: str, verdict: Verdict) -> Judgement:
        """Record what a judge says of a decided iteration. Raises Conflict when it said something else before."""
        service = self._control("orchestrator", "recording a judgement")
        path = f"/v1/runs/{id}/iterations/{iteration}/judgements/{judge}"
        return await service.call("PUT", path, answer=Judgement, body=verdict)

    async def pairs(
        self, id: str, iteration: int, offset: int = 0, limit: int = 50, query: PairQuery | None = None
    ) -> PairPage:
        """Preference pairs of an iteration, those that a query finds, in its order."""
        asked = PairPageQuery(**(query or PairQuery()).model_dump(), offset=offset, limit=limit)
        return await self._service("orchestrator").call(
            "GET", f"/v1/runs/{id}/iterations/{iteration}/pairs", answer=PairPage,
            params=asked.model_dump(mode="json", exclude_none=True),
        )  # fmt: skip

    async def pair(self, id: str, iteration: int, number: int) -> PairDetail:
        """A pair among all responses it was chosen from; `PairPage.numbers` gives the numbers."""
        return await self._service("orchestrator").call(
            "GET", f"/v1/runs/{id}/iterations/{iteration}/pairs/{number}", answer=PairDetail
        )

    async def rollouts(
        self, id: str, iteration: int, *, evaluation: bool = False, offset: int = 0, limit: int = 50
    ) -> RolloutPage:
        """Rollouts of an iteration with their rewards; of the held-out prompts with `evaluation`."""
        return await self._service("orchestrator").call(
            "GET", f"/v1/runs/{id}/iterations/{iteration}/rollouts", answer=RolloutPage,
            params={"offset": offset, "limit": limit, "evaluation": str(evaluation).lower()},
        )  # fmt: skip

    def events(self, id: str, after: str = "0") -> AsyncIterator[Event]:
        """Events of a run: history after that id, then live, over restarts of the orchestrator. Endless."""
        return self._follow("orchestrator", f"/v1/runs/{id}/events", after, ended=None)

    def all_events(self, after: str = "0") -> AsyncIterator[Event]:
        """Changes of all runs (`run.*`, `iteration.decided`; the run is `data["run"]`), like `events`."""
        return self._follow("orchestrator", "/v1/events", after, ended=None)

    async def wait(self, id: str, timeout_seconds: float | None = None) -> RunView:
        """Wait until a run is neither queued nor running (idle, paused, failed, cancelled). Raises DeadlineExceeded."""

        async def ended() -> RunView | None:
            view = await self.run(id)
            return None if view.status in (RunStatus.QUEUED, RunStatus.RUNNING) else view

        return await _poll(ended, f"run {id}", timeout_seconds)

    # -- training jobs ------------------------------------------------------------------------------------------------

    async def submit_job(self, job: TrainingJob) -> Job:
        """Queue a training job. The same job twice is one job."""
        return await self._control("trainer", "submitting a job").call("POST", "/v1/jobs", answer=Job, body=job)

    async def job(self, id: str) -> Job:
        """A training job. Raises NotFound."""
        return await self._service("trainer").call("GET", f"/v1/jobs/{id}", answer=Job)

    async def jobs(self) -> list[Job]:
        """Training jobs, newest first."""
        return JOBS.validate_json((await self._service("trainer").send("GET", "/v1/jobs")).content)

    async def cancel_job(self, id: str) -> Job:
        """A waiting job ends at once, a running one within seconds."""
        return await self._control("trainer", "cancelling a job").call("DELETE", f"/v1/jobs/{id}", answer=Job)

    async def retry_job(self, id: str) -> Job:
        """Queue a failed or cancelled job again; it goes on from its last save."""
        return await self._control("trainer", "retrying a job").call("POST", f"/v1/jobs/{id}/retry", answer=Job)

    def job_events(self, id: str, after: str = "0") -> AsyncIterator[Event]:
        """Events of a training job; ends with the job."""

        async def ended() -> bool:
            return (await self.job(id)).state.final

        return self._follow("trainer", f"/v1/jobs/{id}/events", after, ended=ended)

    async def wait_job(
        self, id: str, on_progress: Callable[[Job, TrainingProgress | None], None] | None = None,
        timeout_seconds: float | None = None,
    ) -> TrainingResult:  # fmt: skip
        """Wait for a training job's end.

        Args:
            on_progress: Called with the job and its progress (None while it is queued), whenever they changed.

        Raises:
            JobFailed: it failed (with the cause) or was cancelled. DeadlineExceeded: after `timeout_seconds`.
        """
        seen: list[tuple[JobState, object]] = []

        async def ended() -> Job | None:
            job = await self.job(id)
            if on_progress and seen[-1:] != [(job.state, job.progress)]:
                seen[:] = [(job.state, job.progress)]
                on_progress(job, TrainingProgress.model_validate(job.progress) if job.progress else None)
            return job if job.state.final else None

        job = await _poll(ended, f"training job {id}", timeout_seconds)
        if job.state is JobState.SUCCEEDED and job.result is not None:
            return TrainingResult.model_validate(job.result)
        cause = job.problem.detail if job.problem else f"it was {job.state.value}"
        raise JobFailed(f"training job {id} did not succeed: {cause}", field=job.problem.field if job.problem else None)

    # -- models -------------------------------------------------------------------------------------------------------

    async def policy(self) -> PolicyInfo:
        """Which policy the generator serves."""
        return await self._service("generator").call("GET", "/v1/policy", answer=PolicyInfo)

    async def set_policy(
        self, checkpoint: str, *, trial: bool = False, timeout_seconds: float = MODEL_SECONDS
    ) -> PolicyInfo:
        """Serve a checkpoint of the store; returns when it is proven. Raises SwapFailed, CheckpointRefused."""
        body = PolicySpec(checkpoint=checkpoint, trial=trial)
        service = self._control("generator", "setting the policy")
        info = await service.call("PUT", "/v1/policy", answer=PolicyInfo, body=body, timeout_seconds=timeout_seconds)

        async def settled() -> PolicyInfo | None:
            current = await self.policy()
            return None if current.state in ("starting", "swapping") else current

        if info.state in ("starting", "swapping"):
            info = await _poll(settled, f"policy {checkpoint}", timeout_seconds)
        if info.state != "serving" or info.checkpoint != checkpoint:
            raise SwapFailed(
                f"{checkpoint} does not serve: the generator is {info.state} ({info.detail or info.version})"
            )
        return info

    async def scorers(self) -> list[ScorerInfo]:
        """Scorers that serve."""
        return SCORERS.validate_json((await self._service("reward").send("GET", "/v1/scorers")).content)

    async def load_scorer(self, name: str, spec: ScorerSpec) -> ScorerInfo:
        """Load, prove and serve a scorer."""
        service = self._control("reward", "loading a scorer")
        return await service.call(
            "PUT", f"/v1/scorers/{name}", answer=ScorerInfo, body=spec, timeout_seconds=MODEL_SECONDS
        )

    async def score(self, items: Sequence[ScoreItem], scorer: str = "default") -> ScoreResponse:
        """Raw rewards, `[items][responses]`."""
        body = ScoreRequest(scorer=scorer, items=tuple(items))
        return await self._service("reward").call(
            "POST", "/v1/score", answer=ScoreResponse, body=body, timeout_seconds=MODEL_SECONDS
        )

    async def logprobs(self, request: LogprobRequest) -> LogprobResponse:
        """Sum log-prob of exact responses under a scorer of kind `logprob`."""
        return await self._service("reward").call(
            "POST", "/v1/logprobs", answer=LogprobResponse, body=request, timeout_seconds=MODEL_SECONDS
        )

    async def generate(
        self, messages: Sequence[Message] | str, *, n: int = 1, temperature: float | None = None,
        max_tokens: int | None = None, top_p: float | None = None, seed: int | None = None,
    ) -> list[ChatAnswer]:  # fmt: skip
        """Sample `n` answers from the served policy (chat completions)."""
        body = ChatRequest(
            model=await self._model(), messages=as_messages(messages), n=n, temperature=temperature,
            max_tokens=max_tokens, top_p=top_p, seed=seed,
        )  # fmt: skip
        response = await self._service("generator").send(
            "POST", "/v1/chat/completions", body=body, timeout_seconds=MODEL_SECONDS
        )
        return chat_answers(response)

    async def stream(
        self, messages: Sequence[Message] | str, *, temperature: float | None = None, max_tokens: int | None = None,
        top_p: float | None = None, seed: int | None = None,
    ) -> AsyncIterator[str]:  # fmt: skip
        """One answer, piece by piece as it is sampled."""
        body = ChatRequest(
            model=await self._model(), messages=as_messages(messages), stream=True, temperature=temperature,
            max_tokens=max_tokens, top_p=top_p, seed=seed,
        )  # fmt: skip
        async with self._service("generator").stream(
            "POST", "/v1/chat/completions", body=body, read_seconds=MODEL_SECONDS
        ) as response:
            async for piece in chat_pieces(response):
                yield piece

    async def sample(self, request: RolloutRequest) -> AsyncIterator[RolloutLine]:
        """Rollouts of many prompts, in order of completion, with token ids and log-probs."""
        service = self._control("generator", "sampling rollouts")
        async with service.stream("POST", "/v1/rollouts", body=request, read_seconds=MODEL_SECONDS) as response:
            async for line in response.aiter_lines():
                if line.strip():
                    yield RolloutLine.model_validate_json(line)

    async def stage_model(self, folder: str | Path, field: str = "model") -> str:
        """Put a local model folder into a local store; returns `staging/…`, usable in a recipe."""
        return await asyncio.to_thread(stage_model, folder, self.connection.store_url, field)

    # -- inner --------------------------------------------------------------------------------------------------------

    async def _model(self) -> str:
        return (await self.policy()).model or "policy"

    async def _follow(
        self, service: str, path: str, after: str, *, ended: Callable[[], Awaitable[bool]] | None
    ) -> AsyncIterator[Event]:
        """An SSE stream over broken connections: it goes on after the last event seen."""
        last, delay, silent_since = after, 0.2, time.monotonic()
        while True:
            try:
                async with self._service(service).stream(
                    "GET", path, read_seconds=SILENCE_SECONDS, headers={"Last-Event-ID": last}
                ) as response:
                    async for event in httpx_sse.EventSource(response).aiter_sse():
                        if event.data:
                            found = Event.model_validate_json(event.data)
                            last, delay, silent_since = found.id, 0.2, time.monotonic()
                            yield found
                if ended is not None and await ended():
                    return
            except OUTAGES:
                if time.monotonic() - silent_since > OUTAGE_SECONDS:
                    raise
            await asyncio.sleep(delay)
            delay = min(delay * 2, 5.0)

    async def close(self) -> None:
        """Close the connections."""
        for service in self._services.values():
            await service.close()
        self._services.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def _poll(look: Callable[[], Awaitable[Answer | None]], what: str, timeout_seconds: float | None) -> Answer:
    """Look until there is an answer, over outages of the service. Raises DeadlineExceeded."""
    began = answered = time.monotonic()
    while True:
        try:
            found = await look()
            answered = time.monotonic()
            if found is not None:
                return found
        except OUTAGES:
            if time.monotonic() - answered > OUTAGE_SECONDS:
                raise
        if timeout_seconds is not None and time.monotonic() - began > timeout_seconds:
            raise DeadlineExceeded(f"{what} has not ended within {timeout_seconds:g} s; it goes on")
        await asyncio.sleep(POLL_SECONDS)
