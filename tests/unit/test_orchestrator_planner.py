"""The planner: which jobs are enqueued when, as a pure function of the jobs there are."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.contracts.jobs import Job, JobRequest, JobState
from services.contracts.problems import Problem
from services.contracts.recipes import ResolvedModels
from services.contracts.runs import Rollback, RunControl, RunRecord, RunStatus, Stage
from services.orchestrator import stages
from services.orchestrator.conductor import choose, holds_services
from services.orchestrator.planner import Plan, incumbent_before, plan
from services.orchestrator.snapshots import Snapshot
from tests.fixtures.orchestrator_stack import recipe

PROBLEM = Problem(title="Job failed", status=500, detail="out of memory", code="job-failed")


def record(**models: Any) -> RunRecord:
    """10 prompts in chunks of 4, 6 held-out prompts in chunks of 4."""
    resolved = ResolvedModels.model_validate({"policy": "models/sft", "reward_model": "models/reward", **models})
    return RunRecord(
        id="r", created_at="2026-11-24", recipe=recipe("datasets/a.jsonl", "datasets/b.jsonl"), models=resolved,
        prompts_total=24, heldout_total=6,
    )  # fmt: skip


def job(request: JobRequest, state: JobState = JobState.SUCCEEDED, **changes: Any) -> Job:
    return Job.model_validate({**request.model_dump(), "state": state, "enqueued_at": 1.0, **changes})


class Simulation:
    """Runs what the planner asks for, one job at a time, in any order."""

    def __init__(self, run: RunRecord, control: RunControl, ahead: int, decisions: dict[int, str]) -> None:
        self.run, self.control, self.ahead, self.decisions = run, control, ahead, decisions
        self.jobs: dict[str, Job] = {}
        self.requests: dict[str, JobRequest] = {}

    def plan(self) -> Plan:
        planned = plan(self.run, self.control, self.jobs, chunks_ahead=self.ahead)
        for request in planned.requests:
            assert request.id not in self.jobs, "a job that exists is not asked for again"
            self.check_dependencies(request)
            self.requests[request.id] = request
            self.jobs[request.id] = job(request, JobState.QUEUED)
        return planned

    def done(self, iteration: int, stage: Stage, chunk: int | None = None) -> bool:
        ids = stages.stage_ids(self.run, iteration, stage) if chunk is None else (
            stages.job_id(self.run.id, iteration, stage, chunk),
        )  # fmt: skip
        return all(id in self.jobs and self.jobs[id].state is JobState.SUCCEEDED for id in ids)

    def check_dependencies(self, request: JobRequest) -> None:
        if request.kind == stages.ROLLBACK_KIND:
            return
        place, stage = request.id.split("/")[1], Stage(request.id.split("/")[2])
        t = int(place.removeprefix("iter-"))
        chunk = int(request.id.split("/")[3]) if stage in stages.CHUNKED else None
        if t > 0:
            assert self.done(t - 1, Stage.DECIDE)
        before: dict[Stage, Callable[[], bool]] = {
            Stage.IMPORT: lambda: True,
            Stage.PROMPTS: lambda: True,
            Stage.SAMPLE: lambda: self.done(t, Stage.PROMPTS),
            Stage.SCORE: lambda: self.done(t, Stage.SAMPLE, chunk),
            Stage.PAIR: lambda: self.done(t, Stage.SAMPLE) and self.done(t, Stage.SCORE),
            Stage.TRAIN: lambda: self.done(t, Stage.PAIR),
            Stage.LOAD: lambda: self.done(t, Stage.TRAIN),
            Stage.EVALUATE: lambda: self.done(t, Stage.LOAD) if t > 0 else self.done(t, Stage.IMPORT),
            Stage.EVALUATE_SCORE: lambda: self.done(t, Stage.EVALUATE, chunk),
            Stage.DECIDE: lambda: self.done(t, Stage.EVALUATE) and self.done(t, Stage.EVALUATE_SCORE),
        }
        assert before[stage](), f"{request.id} was asked for before what it needs"

    def finish(self, id: str) -> None:
        request = self.requests[id]
        result = (
            {"decision": self.decisions[int(id.split("/")[1].removeprefix("iter-"))]} if id.endswith("/decide") else {}
        )
        self.jobs[id] = job(request, result=result)

    def end(self, choice: random.Random, fail: float = 0.0) -> Plan:
        """Finish live jobs in a random order until nothing is left; failed ones are retried, as `resume` does."""
        for _ in range(2000):
            planned = self.plan()
            if planned.status is RunStatus.FAILED:
                assert planned.requests == ()
                for id, known in self.jobs.items():
                    if known.state is JobState.FAILED:
                        self.jobs[id] = known.model_copy(update={"state": JobState.QUEUED})
                continue
            live = sorted(id for id, known in self.jobs.items() if not known.state.final)
            if not live:
                return planned
            id = choice.choice(live)
            if choice.random() < fail:
                self.jobs[id] = job(self.requests[id], JobState.FAILED, problem=PROBLEM)
            else:
                self.finish(id)
        raise AssertionError("the run does not end")


DECISIONS = {0: "baseline", 1: "promoted", 2: "rejected", 3: "promoted"}


@given(seed=st.integers(0, 10**6), ahead=st.integers(1, 5), fail=st.sampled_from([0.0, 0.1, 0.3]))
@settings(max_examples=60, deadline=None)
def test_any_order_of_completions_and_failures_leads_to_the_same_end(seed: int, ahead: int, fail: float) -> None:
    run = record(policy_import="hub:a/b", reward_model_import="store:staging/rm")
    end = Simulation(run, RunControl(iterations=3), ahead, DECISIONS)
    last = end.end(random.Random(seed), fail)
    assert last.status is RunStatus.IDLE
    assert last.incumbent == 3
    straight = Simulation(run, RunControl(iterations=3), 100, DECISIONS)
    straight.end(random.Random(0))
    assert end.requests == straight.requests


def advance(until: str, control: RunControl | None = None, run: RunRecord | None = None) -> Simulation:
    """A simulation in which everything before the job `until` has succeeded, and `until` is queued."""
    simulation = Simulation(run or record(), control or RunControl(iterations=3), 100, DECISIONS)
    for _ in range(200):
        simulation.plan()
        if until in simulation.jobs:
            return simulation
        for id in [id for id, known in simulation.jobs.items() if not known.state.final]:
            simulation.finish(id)
    raise AssertionError(f"{until} is never asked for")


@pytest.mark.parametrize(
    ("until", "asked"),
    [
        ("r/iter-0/evaluate/00000", ["r/iter-0/evaluate/00000", "r/iter-0/evaluate/00001"]),
        ("r/iter-1/prompts", ["r/iter-1/prompts"]),
        ("r/iter-1/sample/00000", [f"r/iter-1/sample/0000{chunk}" for chunk in range(3)]),
        ("r/iter-1/score/00002", [f"r/iter-1/score/0000{chunk}" for chunk in range(3)]),
        ("r/iter-1/pair", ["r/iter-1/pair"]),
        ("r/iter-1/train", ["r/iter-1/train"]),
        ("r/iter-1/load", ["r/iter-1/load"]),
        ("r/iter-1/evaluate-score/00000", ["r/iter-1/evaluate-score/00000", "r/iter-1/evaluate-score/00001"]),
        ("r/iter-2/decide", ["r/iter-2/decide"]),
    ],
)
def test_each_stage_follows_the_one_before(until: str, asked: list[str]) -> None:
    simulation = advance(until)
    assert [id for id, known in simulation.jobs.items() if not known.state.final] == asked


def test_a_chunk_is_scored_as_soon_as_it_is_sampled() -> None:
    simulation = advance("r/iter-1/sample/00000")
    simulation.finish("r/iter-1/sample/00001")
    assert [request.id for request in simulation.plan().requests] == ["r/iter-1/score/00001"]


def test_no_more_chunks_are_queued_than_asked_ahead() -> None:
    simulation = advance("r/iter-1/prompts")
    simulation.finish("r/iter-1/prompts")
    simulation.ahead = 2
    assert [request.id for request in simulation.plan().requests] == ["r/iter-1/sample/00000", "r/iter-1/sample/00001"]
    assert simulation.plan().requests == ()
    simulation.finish("r/iter-1/sample/00000")
    assert "r/iter-1/sample/00002" in [request.id for request in simulation.plan().requests]


def test_dpo_starts_from_the_incumbent_and_its_reference_is_the_initial_policy_always() -> None:
    payload = advance("r/iter-3/train").requests["r/iter-3/train"].payload
    assert payload["start"] == "runs/r/iter-1/checkpoint", "iteration 2 was rejected"
    assert payload["reference"] == "models/sft"
    assert payload["pairs"] == ["runs/r/iter-3/pairs.parquet"]
    assert payload["output"] == "runs/r/iter-3/checkpoint"


def test_start_from_reference_trains_from_the_initial_policy() -> None:
    run = record()
    run = run.model_copy(update={"recipe": run.recipe.model_copy(update={"start_from": "reference"})})
    assert advance("r/iter-2/train", run=run).requests["r/iter-2/train"].payload["start"] == "models/sft"


@pytest.mark.parametrize(("own", "seed"), [(None, 7), (3, 3)])
def test_the_run_s_seed_reaches_training_unless_dpo_has_its_own(own: int | None, seed: int) -> None:
    run = record()
    dpo = run.recipe.dpo.model_copy(update={"seed": own})
    run = run.model_copy(update={"recipe": run.recipe.model_copy(update={"seed": 7, "dpo": dpo})})
    assert advance("r/iter-1/train", run=run).requests["r/iter-1/train"].payload["config"]["seed"] == seed


def test_models_are_imported_before_anything_uses_them() -> None:
    run = record(policy_import="hub:a/b")
    planned = plan(run, RunControl(iterations=1), {})
    assert [request.payload for request in planned.requests] == [
        {"kind": "import_model", "model_kind": "policy", "source": "hub:a/b", "output": "models/sft"}
    ]
    assert planned.requests[0].queue == "train"


def test_a_paused_run_enqueues_nothing_and_goes_on_where_it_was() -> None:
    simulation = advance("r/iter-1/sample/00000")
    simulation.finish("r/iter-1/sample/00000")
    paused = plan(simulation.run, RunControl(iterations=3, paused=True), simulation.jobs)
    assert (paused.status, paused.requests, paused.cancel) == (RunStatus.PAUSED, (), ())
    assert [request.id for request in simulation.plan().requests] == ["r/iter-1/score/00000"]


def test_a_cancelled_run_cancels_what_lives() -> None:
    simulation = advance("r/iter-1/sample/00000")
    control = RunControl(iterations=3, cancelled=True)
    planned = plan(simulation.run, control, simulation.jobs)
    assert planned.status is RunStatus.CANCELLED
    assert planned.cancel == tuple(f"r/iter-1/sample/0000{chunk}" for chunk in range(3))
    for id in planned.cancel:
        simulation.jobs[id] = simulation.jobs[id].model_copy(update={"cancel_requested": True})
    assert plan(simulation.run, control, simulation.jobs).cancel == ()


def test_a_failed_job_fails_the_run_with_its_cause() -> None:
    simulation = advance("r/iter-1/train")
    simulation.jobs["r/iter-1/train"] = job(simulation.requests["r/iter-1/train"], JobState.FAILED, problem=PROBLEM)
    planned = simulation.plan()
    assert planned.status is RunStatus.FAILED
    assert planned.problem is not None
    assert planned.problem.detail == "job r/iter-1/train: out of memory"


def test_a_job_cancelled_on_its_own_fails_the_run_and_says_so() -> None:
    simulation = advance("r/iter-1/train")
    simulation.jobs["r/iter-1/train"] = job(simulation.requests["r/iter-1/train"], JobState.CANCELLED)
    planned = simulation.plan()
    assert planned.status is RunStatus.FAILED
    assert "cancelled on its own" in (planned.problem.detail if planned.problem else "")


def test_a_decided_iteration_needs_no_other_job_than_its_decision() -> None:
    simulation = advance("r/iter-2/prompts")
    only = {id: known for id, known in simulation.jobs.items() if id.endswith("/decide")}
    planned = plan(simulation.run, simulation.control, only)
    assert [request.id for request in planned.requests] == ["r/iter-2/prompts"]
    assert (planned.iteration, planned.incumbent, planned.decided) == (2, 1, 1)


def test_zero_iterations_evaluate_the_baseline_only() -> None:
    simulation = Simulation(record(), RunControl(iterations=0), 100, DECISIONS)
    assert simulation.end(random.Random(1)).status is RunStatus.IDLE
    assert {id.split("/")[1] for id in simulation.jobs} == {"iter-0"}


def rollback(before: int, to: int) -> Rollback:
    return Rollback(before_iteration=before, to_iteration=to, reason="worse in practice", at="2026-11-24")


def test_a_rollback_is_served_before_the_next_iteration_starts_and_changes_its_incumbent() -> None:
    control = RunControl(iterations=2)
    simulation = advance("r/iter-2/prompts", control)
    del simulation.jobs["r/iter-2/prompts"]
    simulation.control = control.model_copy(update={"rollbacks": (rollback(2, 0),)})
    (request,) = simulation.plan().requests
    assert (request.id, request.payload["policy"]) == ("r/rollback/00000", "models/sft")
    assert simulation.plan().requests == (), "iteration 2 waits until it is served"
    simulation.finish(request.id)
    planned = simulation.plan()
    assert [request.id for request in planned.requests] == ["r/iter-2/prompts"]
    assert planned.incumbent == 0


def test_a_rollback_of_an_idle_run_is_served_too() -> None:
    simulation = Simulation(record(), RunControl(iterations=1), 100, DECISIONS)
    simulation.end(random.Random(1))
    simulation.control = RunControl(iterations=1, rollbacks=(rollback(2, 0),))
    planned = simulation.plan()
    assert [request.id for request in planned.requests] == ["r/rollback/00000"]
    simulation.finish("r/rollback/00000")
    assert simulation.plan().status is RunStatus.IDLE


@pytest.mark.parametrize(
    ("promoted", "rollbacks", "iteration", "expected"),
    [
        ([], (), 3, 0),
        ([1], (), 2, 1),
        ([1, 2], (), 3, 2),
        ([1, 2], ((3, 1),), 3, 1),
        ([1, 2], ((2, 0),), 3, 2),  # iteration 2 was promoted after the rollback
        ([1, 2], ((3, 1), (3, 0)), 3, 0),  # the last one counts
        ([1], ((4, 0),), 3, 1),  # not yet in effect
    ],
)
def test_the_incumbent_is_a_fold_over_decisions_and_rollbacks(
    promoted: list[int], rollbacks: tuple[tuple[int, int], ...], iteration: int, expected: int
) -> None:
    control = RunControl(iterations=9, rollbacks=tuple(rollback(*one) for one in rollbacks))
    assert incumbent_before(control, promoted, iteration) == expected


RUNNING, IDLE, PAUSED = Plan(RunStatus.RUNNING), Plan(RunStatus.IDLE), Plan(RunStatus.PAUSED)


@pytest.mark.parametrize(
    ("plans", "holds", "current", "expected"),
    [
        ({"a": IDLE, "b": RUNNING, "c": RUNNING}, set[str](), None, "b"),
        ({"a": RUNNING, "b": RUNNING}, set[str](), "b", "b"),  # an older run that is resumed waits
        ({"a": PAUSED, "b": RUNNING}, {"a"}, None, "a"),  # its last chunk still uses the generator
        ({"a": RUNNING, "b": Plan(RunStatus.RUNNING, live=("b/iter-1/train",))}, set[str](), None, "b"),
        ({"a": IDLE}, set[str](), "a", None),
    ],
)
def test_one_run_works_at_a_time(
    plans: dict[str, Plan], holds: set[str], current: str | None, expected: str | None
) -> None:
    assert choose(plans, {run: run in holds for run in plans}, current) == expected


@pytest.mark.parametrize(
    ("stage", "chunk", "expected"),
    [(Stage.SAMPLE, 0, True), (Stage.SCORE, 0, True), (Stage.DECIDE, None, True), (Stage.TRAIN, None, False)],
)
def test_jobs_that_use_generator_or_scorers_keep_other_runs_waiting(
    stage: Stage, chunk: int | None, expected: bool
) -> None:
    id = stages.job_id("r", 1, stage, chunk)
    running = Job(
        id=id, queue=stages.QUEUES[stage], kind=stage, payload={}, topic="r", max_attempts=1, enqueued_at=0.0,
        state=JobState.RUNNING,
    )  # fmt: skip
    shot = Snapshot(record(), RunControl(iterations=1), {}, {id: running}, Plan(RunStatus.PAUSED, live=(id,)))
    assert holds_services(shot) is expected
