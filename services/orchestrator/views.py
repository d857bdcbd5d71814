"""What the API shows of a run, derived from its record, its jobs and its decided iterations. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from services.contracts.jobs import Job, JobState
from services.contracts.judgements import Judgement
from services.contracts.runs import (
    IterationRecord,
    IterationView,
    RunControl,
    RunRecord,
    RunStatus,
    RunView,
    Stage,
    StageView,
)
from services.orchestrator import stages
from services.orchestrator.planner import Plan, incumbent_before

PROMPT_STAGES = frozenset({Stage.SAMPLE, Stage.SCORE, Stage.EVALUATE, Stage.EVALUATE_SCORE})
FIGURES = ("loss", "accuracy", "margin")


def run_view(
    record: RunRecord,
    control: RunControl,
    plan: Plan,
    decided: Mapping[int, IterationRecord],
    jobs: Mapping[str, Job],
    *,
    shown: Mapping[int, IterationView],
    queued: bool,
    now: float,
) -> RunView:
    """A run with all its iterations, the current one live.

    Args:
        shown: The decided iterations as `decided_view` shows them.
        queued: Another run has the generator.
        now: Seconds since the epoch.
    """
    status = RunStatus.QUEUED if queued and plan.status is RunStatus.RUNNING else plan.status
    iterations = [shown[t] for t in sorted(decided)]
    if plan.iteration is not None and plan.iteration not in decided:
        iterations.append(live_view(record, plan.iteration, jobs, now=now))
    incumbent = plan.incumbent
    if incumbent is None and decided:
        promoted = [t for t, known in decided.items() if known.decision == "promoted"]
        incumbent = incumbent_before(control, promoted, max(decided) + 1)
    return RunView(
        id=record.id,
        status=status,
        created_at=record.created_at,
        recipe=record.recipe,
        iterations_asked=control.iterations,
        iterations_decided=plan.decided,
        incumbent=None if incumbent is None else stages.policy_version(record, incumbent),
        iterations=tuple(iterations),
        problem=plan.problem,
        skipped_lines=record.skipped_lines,
        warnings=record.warnings,
    )


def decided_view(record: RunRecord, decided: IterationRecord, judgements: tuple[Judgement, ...] = ()) -> IterationView:
    """An iteration once it is decided, from its record alone."""
    counts = {stage: _jobs_of(record, stage) for stage in stages.stages_of(decided.iteration)}
    shown = tuple(_finished(record, stage, count, decided) for stage, count in counts.items() if count)
    return IterationView(iteration=decided.iteration, stages=shown, record=decided, judgements=judgements)


class DecidedViews:
    """The decided iterations of all runs as they are shown; made once, for a record does not change."""

    def __init__(self) -> None:
        self._views: dict[str, dict[int, IterationView]] = {}

    def of(
        self,
        record: RunRecord,
        decided: Mapping[int, IterationRecord],
        judgements: Mapping[int, tuple[Judgement, ...]],
    ) -> dict[int, IterationView]:
        """By iteration, with the judgements there are now."""
        views = self._views.setdefault(record.id, {})
        for iteration, known in decided.items():
            given = judgements.get(iteration, ())
            if iteration not in views or views[iteration].judgements != given:
                views[iteration] = decided_view(record, known, given)
        return dict(views)


def live_view(record: RunRecord, iteration: int, jobs: Mapping[str, Job], *, now: float) -> IterationView:
    """An iteration that is not decided: its stages from the jobs."""
    shown: list[StageView] = []
    for stage in stages.stages_of(iteration):
        if ids := stages.stage_ids(record, iteration, stage):  # else there is nothing to import
            shown.append(stage_view(record, stage, [jobs.get(id) for id in ids], now=now))
    return IterationView(iteration=iteration, stages=tuple(shown))


def stage_view(record: RunRecord, stage: Stage, jobs: Sequence[Job | None], *, now: float) -> StageView:
    """One stage, from its jobs (None: not enqueued yet)."""
    known = [job for job in jobs if job is not None]
    done = sum(1 for job in known if job.state is JobState.SUCCEEDED)
    ended = any(job.state in (JobState.FAILED, JobState.CANCELLED) for job in known)
    state = "failed" if ended else "succeeded" if done == len(jobs) else "running" if known else "waiting"
    items_done, items_total = _items(record, stage, jobs)
    seconds = _seconds(known, finished=state == "succeeded", now=now)
    running = [job for job in known if job.state is JobState.RUNNING]
    return StageView(
        stage=stage,
        state=state,
        done=done,
        total=len(jobs),
        items_done=items_done,
        items_total=items_total,
        tokens_per_second=_rate(known, running, seconds),
        seconds=seconds,
        seconds_left=_seconds_left(running, items_done, items_total, seconds) if state == "running" else None,
        detail=_detail(running or known),
    )


def seconds_by_stage(record: RunRecord, iteration: int, jobs: Mapping[str, Job], *, now: float) -> dict[str, float]:
    """First job's start to last job's end of each stage, seconds. A job that still runs (the asking one) ends now."""
    found: dict[str, float] = {}
    for stage in stages.stages_of(iteration):
        known = [jobs[id] for id in stages.stage_ids(record, iteration, stage) if id in jobs]
        seconds = _seconds(known, finished=all(job.finished_at for job in known), now=now)
        if seconds is not None:
            found[stage.value] = round(seconds, 3)
    return found


def _finished(record: RunRecord, stage: Stage, total: int, decided: IterationRecord) -> StageView:
    items = _whole(record, stage)
    return StageView(
        stage=stage,
        state="succeeded",
        done=total,
        total=total,
        items_done=items,
        items_total=items,
        tokens_per_second=decided.metrics.sampled_tokens_per_second if stage is Stage.SAMPLE else None,
        seconds=decided.seconds_by_stage.get(stage.value),
    )


def _jobs_of(record: RunRecord, stage: Stage) -> int:
    return len(stages.chunks_of(record, stage)) if stage in stages.CHUNKED else 1


def _whole(record: RunRecord, stage: Stage) -> int:
    if stage not in PROMPT_STAGES:
        return 0
    sampled = stage in (Stage.SAMPLE, Stage.SCORE)
    return record.recipe.sampling.prompts_per_iteration if sampled else record.heldout_total


def _items(record: RunRecord, stage: Stage, jobs: Sequence[Job | None]) -> tuple[int, int]:
    if stage is Stage.TRAIN:
        progress = _progress(jobs[0])
        return int(progress.get("step", 0)), int(progress.get("total_steps", 0))
    whole = _whole(record, stage)
    if not whole:
        return 0, 0
    sampled = stage in (Stage.SAMPLE, Stage.SCORE)
    size = record.recipe.sampling.chunk_size if sampled else record.recipe.evaluation.chunk_size
    done = 0
    for chunk, job in enumerate(jobs):
        of_chunk = min(size, whole - chunk * size)
        if job is not None and job.state is JobState.SUCCEEDED:
            done += of_chunk
        else:
            done += min(of_chunk, int(_progress(job).get("items_done", 0)))
    return done, whole


def _progress(job: Job | None) -> dict[str, Any]:
    return (job.progress or {}) if job is not None else {}


def _seconds(jobs: Sequence[Job], *, finished: bool, now: float) -> float | None:
    starts = [job.started_at for job in jobs if job.started_at is not None]
    if not starts:
        return None
    ends = [job.finished_at for job in jobs if job.finished_at is not None]
    end = max(ends) if finished and ends else now
    return max(0.0, end - min(starts))


def _rate(known: Sequence[Job], running: Sequence[Job], seconds: float | None) -> float | None:
    if running:
        rates = [float(rate) for job in running if (rate := _progress(job).get("tokens_per_second")) is not None]
        return sum(rates) if rates else None
    tokens = sum(int((job.result or {}).get("tokens", 0)) for job in known)
    return tokens / seconds if tokens and seconds else None


def _seconds_left(running: Sequence[Job], done: int, total: int, seconds: float | None) -> float | None:
    for job in running:
        if (left := _progress(job).get("seconds_left")) is not None:
            return float(left)
    if not done or not total or seconds is None:
        return None
    return seconds * (total - done) / done


def _detail(jobs: Sequence[Job]) -> str | None:
    for job in jobs:
        progress = _progress(job)
        if waiting := progress.get("waiting"):
            return str(waiting)
        figures = [f"{name} {float(progress[name]):.4g}" for name in FIGURES if progress.get(name) is not None]
        warning = progress.get("warning")
        if warning or figures:
            return "; ".join(part for part in (", ".join(figures), str(warning or "")) if part)
        if phase := progress.get("phase"):
            return str(phase)
    return None
