"""What the API shows of stages, and how models of a recipe are resolved."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.contracts.errors import InvalidInput
from services.contracts.jobs import Job, JobState
from services.contracts.judgements import Judgement, Verdict
from services.contracts.recipes import ResolvedModels
from services.contracts.runs import IterationMetrics, IterationRecord, RunControl, RunRecord, RunStatus, Stage
from services.orchestrator import stages
from services.orchestrator.models import resolve_models
from services.orchestrator.planner import Plan
from services.orchestrator.views import (
    DecidedViews,
    decided_view,
    live_view,
    run_view,
    seconds_by_stage,
    stage_view,
)
from services.platform.store import ArtifactStore
from tests.fixtures.fake_services import publish_checkpoint
from tests.fixtures.orchestrator_stack import recipe

RECIPE = recipe("datasets/a.jsonl", "datasets/b.jsonl")
RECORD = RunRecord(
    id="r", created_at="2026-11-24", recipe=RECIPE, prompts_total=24, heldout_total=6,
    models=ResolvedModels(policy="models/sft", reward_model="models/reward"), warnings=("careful",),
)  # fmt: skip


def job(stage: Stage, chunk: int | None, state: JobState, **changes: object) -> Job:
    values = {
        "id": stages.job_id("r", 1, stage, chunk), "queue": "q", "kind": stage.value, "payload": {}, "topic": "r",
        "max_attempts": 4, "state": state, "enqueued_at": 0.0, **changes,
    }  # fmt: skip
    return Job.model_validate(values)


def test_a_stage_nobody_has_begun_waits() -> None:
    view = stage_view(RECORD, Stage.SAMPLE, [None, None, None], now=10.0)
    assert (view.state, view.done, view.total, view.items_done, view.items_total) == ("waiting", 0, 3, 0, 10)
    assert view.seconds is None


def test_a_running_stage_adds_up_its_chunks() -> None:
    jobs = [
        job(Stage.SAMPLE, 0, JobState.SUCCEEDED, started_at=100.0, finished_at=110.0),
        job(Stage.SAMPLE, 1, JobState.RUNNING, started_at=105.0, progress={"items_done": 1, "tokens_per_second": 50.0}),
        None,
    ]
    view = stage_view(RECORD, Stage.SAMPLE, jobs, now=120.0)
    assert (view.state, view.done, view.items_done, view.items_total) == ("running", 1, 5, 10)
    assert view.tokens_per_second == 50.0
    assert view.seconds == 20.0
    assert view.seconds_left == pytest.approx(20.0)


def test_the_last_chunk_counts_its_own_size() -> None:
    jobs = [job(Stage.SAMPLE, chunk, JobState.SUCCEEDED, started_at=1.0, finished_at=5.0 + chunk) for chunk in range(3)]
    view = stage_view(RECORD, Stage.SAMPLE, jobs, now=99.0)
    assert (view.state, view.items_done, view.seconds, view.seconds_left) == ("succeeded", 10, 6.0, None)


def test_training_shows_steps_and_figures() -> None:
    progress = {"step": 3, "total_steps": 12, "loss": 0.61234, "accuracy": 0.75, "seconds_left": 9.0}
    view = stage_view(RECORD, Stage.TRAIN, [job(Stage.TRAIN, None, JobState.RUNNING, progress=progress)], now=1.0)
    assert (view.items_done, view.items_total, view.seconds_left) == (3, 12, 9.0)
    assert view.detail == "loss 0.6123, accuracy 0.75"


def test_a_tracker_that_was_given_up_is_told_beside_the_figures() -> None:
    warning = "wandb gets no more of this training: it does not answer"
    running = job(Stage.TRAIN, None, JobState.RUNNING, started_at=1.0, progress={"loss": 0.5, "warning": warning})
    assert stage_view(RECORD, Stage.TRAIN, [running], now=2.0).detail == f"loss 0.5; {warning}"
    early = job(Stage.TRAIN, None, JobState.RUNNING, started_at=1.0, progress={"phase": "training", "warning": warning})
    assert stage_view(RECORD, Stage.TRAIN, [early], now=2.0).detail == warning


def test_a_job_that_waits_for_a_service_says_so() -> None:
    waiting = job(Stage.SAMPLE, 0, JobState.RUNNING, progress={"items_done": 0, "waiting": "the engine is starting"})
    assert stage_view(RECORD, Stage.SAMPLE, [waiting, None, None], now=1.0).detail == "the engine is starting"


def test_a_failed_job_fails_its_stage() -> None:
    jobs = [job(Stage.SAMPLE, 0, JobState.FAILED), job(Stage.SAMPLE, 1, JobState.RUNNING), None]
    assert stage_view(RECORD, Stage.SAMPLE, jobs, now=1.0).state == "failed"


def decided(iteration: int) -> IterationRecord:
    return IterationRecord(
        run_id="r", iteration=iteration, version=f"r/iter-{iteration}", incumbent="models/sft", serving="models/sft",
        decision="rejected", reasons=("failed: …",), metrics=IterationMetrics(), decided_at="2026-11-24",
        seconds_by_stage={"train": 12.0},
    )  # fmt: skip


def test_a_decided_iteration_is_shown_from_its_record_alone() -> None:
    view = decided_view(RECORD, decided(1))
    assert {stage.state for stage in view.stages} == {"succeeded"}
    assert next(stage for stage in view.stages if stage.stage is Stage.TRAIN).seconds == 12.0


def test_a_new_judgement_shows_at_once_and_nothing_else_is_made_again() -> None:
    views, records = DecidedViews(), {0: decided(0), 1: decided(1)}
    first = views.of(RECORD, records, {})
    said = (Judgement(judge="gold", verdict=Verdict(win_rate=0.6, prompts=50), judged_at="2026-11-24"),)
    second = views.of(RECORD, records, {1: said})
    assert (first[1].judgements, second[1].judgements) == ((), said)
    assert second[0] is first[0], "an iteration that nobody judged is shown as it was made"


def test_a_decided_iteration_counts_the_same_jobs_as_when_it_was_live() -> None:
    live, after = live_view(RECORD, 1, {}, now=0.0), decided_view(RECORD, decided(1))
    assert [(stage.stage, stage.total) for stage in live.stages] == [(s.stage, s.total) for s in after.stages]


def test_an_iteration_without_imports_shows_no_import_stage() -> None:
    assert [stage.stage for stage in live_view(RECORD, 0, {}, now=0.0).stages] == [
        Stage.EVALUATE, Stage.EVALUATE_SCORE, Stage.DECIDE,
    ]  # fmt: skip


def test_seconds_by_stage_run_from_the_first_start_to_the_last_end() -> None:
    jobs = [
        job(Stage.SAMPLE, 0, JobState.SUCCEEDED, started_at=10.0, finished_at=14.0),
        job(Stage.SAMPLE, 1, JobState.SUCCEEDED, started_at=12.0, finished_at=20.0),
        job(Stage.DECIDE, None, JobState.RUNNING, started_at=30.0),
    ]
    assert seconds_by_stage(RECORD, 1, {job.id: job for job in jobs}, now=31.5) == {"sample": 10.0, "decide": 1.5}


@pytest.mark.parametrize(("queued", "status"), [(True, RunStatus.QUEUED), (False, RunStatus.RUNNING)])
def test_a_run_waits_as_queued_while_another_has_the_generator(queued: bool, status: RunStatus) -> None:
    plan = Plan(RunStatus.RUNNING, iteration=1, incumbent=0)
    view = run_view(RECORD, RunControl(iterations=2), plan, {}, {}, shown={}, queued=queued, now=0.0)
    assert view.status is status
    assert (view.incumbent, view.warnings) == ("models/sft", ("careful",))


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    store = ArtifactStore(str(tmp_path / "store"))
    publish_checkpoint(store, "models/sft", "policy")
    publish_checkpoint(store, "models/reward", "reward_model")
    (tmp_path / "store/staging/mine").mkdir(parents=True)
    return store


@pytest.mark.parametrize(
    ("policy", "folder", "source"),
    [
        ("models/sft", "models/sft", None),
        ("staging/mine", "models/mine", "store:staging/mine"),
        ("staging/sft", "models/sft", None),  # imported before
        ("RLHFlow/LLaMA3-SFT", "models/RLHFlow--LLaMA3-SFT", "hub:RLHFlow/LLaMA3-SFT"),
        ("hub:gpt2", "models/gpt2", "hub:gpt2"),
        ("hub:a/b@main", "models/a--b--main", "hub:a/b@main"),
    ],
)
def test_each_form_of_a_model_is_resolved(store: ArtifactStore, policy: str, folder: str, source: str | None) -> None:
    found = resolve_models(RECIPE.model_copy(update={"policy": policy}), store)
    assert (found.policy, found.policy_import) == (folder, source)


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        ({"policy": "/home/me/model"}, "recipe.policy", "ratchet run"),
        ({"policy": "./model"}, "recipe.policy", "ratchet run"),
        ({"policy": "../../etc"}, "recipe.policy", "cannot be resolved"),
        ({"policy": "models/../runs"}, "recipe.policy", "cannot be resolved"),
        ({"policy": "gpt2"}, "recipe.policy", "OWNER/NAME"),
        ({"policy": "models/absent"}, "recipe.policy", "no manifest"),
        ({"policy": "runs/x/iter-2/checkpoint"}, "recipe.policy", "no manifest"),
        ({"policy": "staging/absent"}, "recipe.policy", "not in the artifact store"),
        ({"policy": "models/reward"}, "recipe.policy", "is a reward_model"),
        ({"reward_model": "models/sft"}, "recipe.reward_model", "is a policy"),
        ({"policy": "a/b", "reward_model": "a/b"}, "recipe.reward_model", "are the same"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_with_its_field(
    store: ArtifactStore, changes: dict[str, str], field: str, says: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        resolve_models(RECIPE.model_copy(update=changes), store)
    assert caught.value.field == field
    assert says in caught.value.detail
