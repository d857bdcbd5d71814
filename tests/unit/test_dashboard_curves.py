"""What the dashboard's charts are made of."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from services.contracts.jobs import Event
from services.contracts.judgements import Judgement, Verdict
from services.contracts.runs import (
    Decision,
    IterationMetrics,
    IterationRecord,
    IterationView,
    PairedTest,
    RunStatus,
    RunView,
)
from services.orchestrator.dashboard.charts import CROSS
from services.orchestrator.dashboard.curves import Curve, curves, training_curve
from services.orchestrator.dashboard.training_curve import MOST_POINTS, TrainingCurve, points_of
from tests.fixtures.orchestrator_stack import recipe

DECISIONS: tuple[Decision, ...] = ("baseline", "promoted", "rejected")


def iteration(number: int, *, judged: bool = True) -> IterationView:
    decision = DECISIONS[min(number, 2)]
    metrics = IterationMetrics(
        proxy_reward=number / 10, proxy_reward_std=1.0, sampled_reward_best=2.0, sampled_reward_spread=1.5,
        dpo_loss=0.6 if number else None, kl=0.5 * number,
    )  # fmt: skip
    record = IterationRecord(
        run_id="r", iteration=number, version=f"r/iter-{number}", incumbent="r/iter-0", serving="r/iter-0",
        decision=decision, reasons=("because",), metrics=metrics, decided_at="2026-11-24T00:00:00+00:00",
        test=PairedTest(mean_difference=0.1, standard_error=0.1, p_value=0.1, n=100) if number else None,
        seconds_by_stage={"sample": 10.0, "train": 20.0 + number},
    )  # fmt: skip
    verdict = Verdict(win_rate=0.6, low=0.55, high=0.65, prompts=50)
    judgements = (Judgement(judge="gold", verdict=verdict, judged_at="now"),) if judged and number else ()
    return IterationView(iteration=number, stages=(), record=record, judgements=judgements)


def view(*iterations: IterationView) -> RunView:
    return RunView(
        id="r", status=RunStatus.IDLE, created_at="2026-11-24T00:00:00+00:00", recipe=recipe("p", "h"),
        iterations_asked=2, iterations_decided=2, incumbent="r/iter-1", iterations=iterations,
    )  # fmt: skip


def of(found: tuple[Curve, ...], id: str) -> Curve:
    return next(curve for curve in found if curve.id == id)


def series(curve: Curve, name: str) -> dict[str, Any]:
    return next(one for one in curve.options["series"] if one["name"] == name)


def test_every_curve_has_one_point_for_each_decided_iteration() -> None:
    undecided = IterationView(iteration=3, stages=())
    found = curves(view(iteration(0), iteration(1), iteration(2), undecided))
    assert of(found, "reward").options["xAxis"]["data"] == ["0", "1", "2"]
    assert series(of(found, "dpo_loss"), "loss")["data"] == [None, 0.6, 0.6]
    assert series(of(found, "stages"), "train")["data"] == [20.0, 21.0, 22.0]


def test_promoted_and_rejected_iterations_are_marked_by_shape() -> None:
    marks = [
        item["symbol"] for item in series(of(curves(view(*map(iteration, range(3)))), "reward"), "candidate")["data"]
    ]
    assert marks == ["diamond", "circle", CROSS]


def test_a_judge_s_win_rate_comes_with_its_interval() -> None:
    found = of(curves(view(*map(iteration, range(3)))), "win_rate")
    rates = [item["value"] if isinstance(item, dict) else item for item in series(found, "judge gold")["data"]]
    assert rates == [None, 0.6, 0.6]
    low, width = series(found, "gold interval low"), series(found, "gold interval high")
    assert low["data"] == [None, 0.55, 0.55]
    assert [None if value is None else round(value, 6) for value in width["data"]] == [None, 0.1, 0.1]
    assert low["stack"] == width["stack"]


def test_the_held_out_reward_is_shaded_by_its_95_percent_interval() -> None:
    reward = of(curves(view(iteration(0), iteration(1))), "reward")
    width = series(reward, "interval high")["data"][1]
    assert round(width, 6) == round(2 * 1.96 * 1.0 / 100**0.5, 6)


def test_a_line_without_any_value_is_left_out_and_a_chart_without_lines_is_empty() -> None:
    found = curves(view(iteration(0, judged=False)))
    assert of(found, "dpo_loss").empty
    assert [key.name for key in of(found, "reward").keys] == ["candidate"]
    assert "No data yet" in of(found, "dpo_loss").options["aria"]["label"]["description"]


def test_a_screen_reader_hears_the_latest_figures() -> None:
    label = of(curves(view(iteration(0), iteration(1))), "kl").options["aria"]["label"]["description"]
    assert label == "KL to the reference by iteration. Latest: KL 0.500."


def progress(step: int, iteration: int = 1, **figures: object) -> Event:
    data = {"step": step, "total_steps": 1000, "loss": 0.5, **figures}
    return Event(id=f"{step}-0", at=0.0, type="job.progress", topic="r", job_id=f"r/iter-{iteration}/train", data=data)


def test_a_training_is_gathered_from_its_events_and_others_are_passed_over() -> None:
    curve = TrainingCurve()
    assert curve.add(progress(1, accuracy=0.7))
    assert not curve.add(progress(2).model_copy(update={"job_id": "r/iter-1/sample/00000"}))
    assert not curve.add(progress(2).model_copy(update={"type": "job.started"}))
    assert not curve.add(progress(2, loss=None))
    assert [(point.step, point.accuracy) for point in curve.points] == [(1, 0.7)]
    curve.add(progress(1, iteration=2))
    assert (curve.iteration, len(curve.points)) == (2, 1)


def test_a_training_that_resumes_from_an_earlier_step_forgets_what_did_not_last() -> None:
    curve = TrainingCurve()
    for step in (10, 20, 30, 20, 21):
        curve.add(progress(step))
    assert [point.step for point in curve.points] == [10, 20, 21]


def test_a_long_training_keeps_its_first_and_last_point_in_bounded_memory() -> None:
    curve = TrainingCurve()
    for step in range(1, 20_001):
        curve.add(progress(step))
    steps = [point.step for point in curve.points]
    assert len(steps) <= MOST_POINTS
    assert len(steps) > MOST_POINTS // 4
    assert (steps[0], steps[-1]) == (1, 20_000)
    assert steps == sorted(set(steps))
    gaps = [b - a for a, b in pairwise(steps)]
    assert max(gaps) < 20_000 / 50, "no part of the curve is thinned away"


def test_a_training_s_curve_has_the_margin_on_an_axis_of_its_own() -> None:
    curve = training_curve(
        points_of([{"step": 1, "loss": 0.6, "accuracy": 0.5, "margin": 2.0}, {"phase": "saving"}]), 3
    )
    assert curve.title == "Training of iteration 3"
    assert [(one["name"], one["yAxisIndex"]) for one in curve.options["series"]] == [
        ("loss", 0), ("accuracy", 0), ("margin", 1),
    ]  # fmt: skip
    assert len(curve.options["yAxis"]) == 2
