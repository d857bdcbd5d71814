"""`plan`: which jobs are to be enqueued now. Pure and level-triggered: it looks at the jobs and remembers nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from services.contracts import layout
from services.contracts.jobs import Job, JobRequest, JobState
from services.contracts.problems import Problem
from services.contracts.runs import RunControl, RunRecord, RunStatus, Stage
from services.contracts.training import DpoJob, ImportModelJob
from services.orchestrator import stages
from services.orchestrator.stages import QUEUES, StageJob, job_id

TRAIN_ATTEMPTS = 3
"""A training that died twice in the same place is not mended by a fourth try."""
UNBOUNDED = 1_000_000


@dataclass(frozen=True)
class Plan:
    """What is to be done about a run now."""

    status: RunStatus
    """As if the run were alone; the conductor makes it `queued` while another run has the generator."""
    requests: tuple[JobRequest, ...] = ()
    cancel: tuple[str, ...] = ()
    """Jobs to be cancelled."""
    live: tuple[str, ...] = ()
    """Jobs that are queued or running."""
    iteration: int | None = None
    """The iteration that is being worked on, or would be next; None when all asked for are decided."""
    incumbent: int | None = None
    """Iteration whose policy the next one starts from; None until the baseline is decided."""
    decided: int = 0
    """Decided iterations, without the baseline."""
    problem: Problem | None = None


def plan(run: RunRecord, control: RunControl, jobs: Mapping[str, Job], *, chunks_ahead: int = UNBOUNDED) -> Plan:
    """What is to be done about a run now, from its jobs alone.

    Args:
        jobs: The run's jobs by id. A decided iteration needs no other job than its `decide`.
        chunks_ahead: Most queued or running jobs of one sampling or evaluation stage.
    """
    live = tuple(job.id for job in jobs.values() if not job.state.final)
    incumbent, current = _fold(run, control, jobs)
    decided = max(0, (current if current is not None else control.iterations + 1) - 1)

    def result(status: RunStatus, requests: Iterable[JobRequest] = (), problem: Problem | None = None) -> Plan:
        doomed = tuple(id for id in live if not jobs[id].cancel_requested) if control.cancelled else ()
        return Plan(
            status,
            tuple(requests),
            doomed,
            live,
            iteration=current,
            incumbent=incumbent,
            decided=decided,
            problem=problem,
        )

    failed = _failure(jobs.values())
    if control.cancelled:
        return result(RunStatus.CANCELLED)
    if failed is not None:
        return result(RunStatus.FAILED, problem=failed)
    pending = _rollback_request(run, control, jobs, current)
    if pending is None and current is None:
        return result(RunStatus.PAUSED if control.paused else RunStatus.IDLE)
    if control.paused:
        return result(RunStatus.PAUSED)
    if pending is not None:
        return result(RunStatus.RUNNING, () if pending.id in jobs else (pending,))
    assert current is not None
    return result(RunStatus.RUNNING, _iteration(run, current, incumbent, jobs, chunks_ahead))


def incumbent_before(control: RunControl, promoted: Iterable[int], iteration: int) -> int:
    """Iteration whose policy is the incumbent of `iteration`: decisions in order, each rollback where it takes effect.

    Args:
        promoted: Iterations whose candidate was promoted.
    """
    incumbent = 0
    wins = set(promoted)
    for t in range(1, iteration + 1):
        if t - 1 in wins:
            incumbent = t - 1
        for rollback in control.rollbacks:
            if rollback.before_iteration == t:
                incumbent = rollback.to_iteration
    return incumbent


def _fold(run: RunRecord, control: RunControl, jobs: Mapping[str, Job]) -> tuple[int | None, int | None]:
    """The incumbent and the first undecided iteration (None: all asked for are decided)."""
    promoted: list[int] = []
    for t in range(control.iterations + 1):
        job = jobs.get(job_id(run.id, t, Stage.DECIDE))
        if job is None or job.state is not JobState.SUCCEEDED or job.result is None:
            return (incumbent_before(control, promoted, t) if t > 0 else None), t
        if job.result["decision"] == "promoted":
            promoted.append(t)
    return incumbent_before(control, promoted, control.iterations + 1), None


def _failure(jobs: Iterable[Job]) -> Problem | None:
    ended = [job for job in jobs if job.state in (JobState.FAILED, JobState.CANCELLED)]
    for job in sorted(ended, key=lambda job: (job.state is not JobState.FAILED, job.finished_at or 0.0, job.id)):
        if job.problem is not None:
            return job.problem.model_copy(update={"detail": f"job {job.id}: {job.problem.detail}", "instance": job.id})
        return Problem(
            type="urn:ratchet:problem:cancelled", title="A job was cancelled", status=409, code="cancelled",
            instance=job.id,
            detail=f"job {job.id} was cancelled on its own; resume the run to go on",
        )  # fmt: skip
    return None


def _rollback_request(
    run: RunRecord, control: RunControl, jobs: Mapping[str, Job], current: int | None
) -> JobRequest | None:
    """The last rollback, while it waits to be served: after the iteration before it, before the one it is for."""
    if not control.rollbacks:
        return None
    number, rollback = len(control.rollbacks) - 1, control.rollbacks[-1]
    here = current if current is not None else control.iterations + 1
    id = stages.rollback_id(run.id, number)
    job = jobs.get(id)
    if here != rollback.before_iteration or (job is not None and job.state is JobState.SUCCEEDED):
        return None
    payload = StageJob(
        run=run.id, iteration=rollback.before_iteration, policy=stages.policy_folder(run, rollback.to_iteration)
    )
    return JobRequest(
        id=id, queue="control", kind=stages.ROLLBACK_KIND, payload=payload.model_dump(mode="json"), topic=run.id
    )


def _iteration(
    run: RunRecord, t: int, incumbent: int | None, jobs: Mapping[str, Job], chunks_ahead: int
) -> list[JobRequest]:
    book = _Book(run, t, jobs)
    if t == 0:
        if not book.done(Stage.IMPORT):
            return [book.training(Stage.IMPORT, chunk) for chunk in book.missing(Stage.IMPORT)]
        return book.evaluation(run.models.policy, 0, chunks_ahead)
    assert incumbent is not None, "iteration 0 is decided, so there is an incumbent"
    if not book.done(Stage.PROMPTS):
        return book.single(Stage.PROMPTS)
    if not (book.done(Stage.SAMPLE) and book.done(Stage.SCORE)):
        return book.flow(Stage.SAMPLE, Stage.SCORE, stages.policy_folder(run, incumbent), chunks_ahead)
    if not book.done(Stage.PAIR):
        return book.single(Stage.PAIR)
    if not book.done(Stage.TRAIN):
        return [] if book.begun(Stage.TRAIN) else [book.training(Stage.TRAIN, None, incumbent)]
    candidate = stages.policy_folder(run, t)
    if not book.done(Stage.LOAD):
        return book.single(Stage.LOAD, policy=candidate)
    return book.evaluation(candidate, incumbent, chunks_ahead)


@dataclass(frozen=True)
class _Book:
    """One iteration's jobs, as questions and requests."""

    run: RunRecord
    t: int
    jobs: Mapping[str, Job]

    def done(self, stage: Stage) -> bool:
        return all(self._succeeded(id) for id in stages.stage_ids(self.run, self.t, stage))

    def begun(self, stage: Stage) -> bool:
        return any(id in self.jobs for id in stages.stage_ids(self.run, self.t, stage))

    def missing(self, stage: Stage) -> list[int]:
        chunks = stages.chunks_of(self.run, stage)
        return [chunk for chunk in chunks if job_id(self.run.id, self.t, stage, chunk) not in self.jobs]

    def _succeeded(self, id: str) -> bool:
        job = self.jobs.get(id)
        return job is not None and job.state is JobState.SUCCEEDED

    def single(self, stage: Stage, *, policy: str | None = None, incumbent: int | None = None) -> list[JobRequest]:
        """The stage's one job, unless it is there already."""
        if self.begun(stage):
            return []
        return [self._request(stage, None, policy=policy, incumbent=incumbent)]

    def flow(self, first: Stage, then: Stage, policy: str, chunks_ahead: int) -> list[JobRequest]:
        """Chunks of `first`, a few ahead, and of `then` as soon as their own `first` succeeded."""
        ids = stages.stage_ids(self.run, self.t, first)
        room = chunks_ahead - sum(1 for id in ids if id in self.jobs and not self.jobs[id].state.final)
        requests = [self._request(first, chunk, policy=policy) for chunk in self.missing(first)[: max(0, room)]]
        for chunk in self.missing(then):
            if self._succeeded(job_id(self.run.id, self.t, first, chunk)):
                requests.append(self._request(then, chunk))
        return requests

    def evaluation(self, policy: str, incumbent: int, chunks_ahead: int) -> list[JobRequest]:
        """Held-out chunks, their scores, and the decision once all are there."""
        if self.done(Stage.EVALUATE) and self.done(Stage.EVALUATE_SCORE):
            return self.single(Stage.DECIDE, policy=policy, incumbent=incumbent)
        return self.flow(Stage.EVALUATE, Stage.EVALUATE_SCORE, policy, chunks_ahead)

    def _request(
        self, stage: Stage, chunk: int | None, *, policy: str | None = None, incumbent: int | None = None
    ) -> JobRequest:
        payload = StageJob(run=self.run.id, iteration=self.t, chunk=chunk or 0, policy=policy, incumbent=incumbent)
        return JobRequest(
            id=job_id(self.run.id, self.t, stage, chunk), queue=QUEUES[stage], kind=stage.value,
            payload=payload.model_dump(mode="json"), topic=self.run.id,
        )  # fmt: skip

    def training(self, stage: Stage, chunk: int | None, incumbent: int = 0) -> JobRequest:
        """A job for the trainer: an import, or DPO from the incumbent against the fixed reference, on new pairs."""
        models, recipe = self.run.models, self.run.recipe
        if stage is Stage.TRAIN:
            start = incumbent if recipe.start_from == "incumbent" else 0
            seed = recipe.seed if recipe.dpo.seed is None else recipe.dpo.seed
            job = DpoJob(
                start=stages.policy_folder(self.run, start), reference=models.policy,
                config=recipe.dpo.model_copy(update={"seed": seed}),
                pairs=(layout.pairs_file(self.run.id, self.t),), output=layout.checkpoint_folder(self.run.id, self.t),
            )  # fmt: skip
        elif chunk == stages.IMPORT_POLICY:
            job = ImportModelJob(model_kind="policy", source=models.policy_import or "", output=models.policy)
        else:
            source = models.reward_model_import or ""
            job = ImportModelJob(model_kind="reward_model", source=source, output=models.reward_model)
        return JobRequest(
            id=job_id(self.run.id, self.t, stage, chunk), queue="train", kind=job.kind, topic=self.run.id,
            payload=job.model_dump(mode="json"), max_attempts=TRAIN_ATTEMPTS,
        )  # fmt: skip
