"""What the dashboard says in words and figures."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from services.contracts.browsing import JudgedResponse, PairDetail
from services.contracts.conversations import Message
from services.contracts.pairs import Pair
from services.contracts.problems import Problem
from services.contracts.runs import (
    IterationMetrics,
    IterationRecord,
    IterationView,
    RunStatus,
    RunView,
    Stage,
    StageView,
)
from services.orchestrator.dashboard import figures, panels, run_page
from services.orchestrator.dashboard.actions import Action, sensible
from tests.fixtures.orchestrator_stack import recipe


def view(status: RunStatus = RunStatus.RUNNING, **changes: object) -> RunView:
    values: dict[str, object] = {
        "id": "r", "status": status, "created_at": "2026-11-24T00:00:00+00:00", "recipe": recipe("p", "h"),
        "iterations_asked": 2, "iterations_decided": 1, "incumbent": "r/iter-1", "iterations": (), **changes,
    }  # fmt: skip
    return RunView.model_validate(values)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "\N{EN DASH}"), (0.84, "0.8 s"), (59.4, "59 s"), (59.7, "1 m 00 s"), (185, "3 m 05 s"),
     (7790, "2 h 10 m"), (273600, "3 d 4 h")],
)  # fmt: skip
def test_a_duration_is_read_at_a_glance(seconds: float | None, shown: str) -> None:
    assert figures.duration(seconds) == shown


def test_figures_keep_what_matters() -> None:
    assert figures.number(0.000123) == "0.00012"
    assert figures.number(1234.5678, 1) == "1,234.6"
    assert figures.signed(-0.02) == "\N{MINUS SIGN}0.020"
    assert figures.p_value(0.0004) == "< 0.001"
    assert figures.percent(0.6123) == "61.2 %"
    assert figures.ago("2026-11-24T10:00:00+00:00", datetime(2026, 11, 24, 13, 0, tzinfo=UTC)) == "3 h ago"


@pytest.mark.parametrize(
    ("status", "actions"),
    [
        (RunStatus.QUEUED, {Action.TRIGGER, Action.PAUSE, Action.CANCEL, Action.ROLLBACK}),
        (RunStatus.RUNNING, {Action.TRIGGER, Action.PAUSE, Action.CANCEL, Action.ROLLBACK}),
        (RunStatus.PAUSED, {Action.TRIGGER, Action.RESUME, Action.CANCEL, Action.ROLLBACK}),
        (RunStatus.IDLE, {Action.TRIGGER, Action.ROLLBACK}),
        (RunStatus.FAILED, {Action.RESUME, Action.ROLLBACK}),
        (RunStatus.CANCELLED, {Action.RESUME, Action.ROLLBACK}),
    ],
)
def test_only_what_makes_sense_can_be_done(status: RunStatus, actions: set[Action]) -> None:
    assert sensible(view(status)) == actions


def test_there_is_nothing_to_roll_back_to_before_the_first_iteration() -> None:
    assert Action.ROLLBACK not in sensible(view(iterations_decided=0))


def test_progress_counts_items_before_jobs() -> None:
    stage = StageView(stage=Stage.SAMPLE, state="running", done=0, total=2, items_done=30, items_total=40)
    assert panels.progress(stage) == 0.75
    assert panels.progress(stage.model_copy(update={"items_total": 0, "done": 1})) == 0.5
    table = panels.stage_table(IterationView(iteration=1, stages=(stage,)))
    assert 'aria-valuenow="75"' in table
    assert "30" in table


def test_what_others_wrote_is_shown_as_text_and_never_as_markup() -> None:
    evil = '<img src=x onerror="alert(1)">'
    problem = Problem(title=evil, status=500, detail=evil)
    for html in (
        panels.trouble(view(RunStatus.FAILED, problem=problem, warnings=(evil,), skipped_lines={evil: 3})),
        panels.problem(problem),
        panels.pair(detail(evil)),
    ):
        assert "<img" not in html
        assert "&lt;img" in html


def detail(text: str) -> PairDetail:
    messages = (Message(role="user", content=text),)
    pair = Pair(
        prompt_id="p", prompt=messages, chosen=(Message(role="assistant", content=text),),
        rejected=(Message(role="assistant", content="b"),), prompt_ids=(1,), chosen_ids=(2,), rejected_ids=(3,),
        chosen_reward=2.0, rejected_reward=-1.0, margin=3.0, chosen_index=2, rejected_index=0, policy_version="v",
        scorer="reward", scorer_revision="1",
    )  # fmt: skip
    rewards = (-1.0, 0.5, 2.0, None)
    roles = ("rejected", None, "chosen", None)
    responses = tuple(
        JudgedResponse(
            index=index, text=text, reward=reward, tokens=1, finish_reason="stop", temperature=1.0, role=role
        )
        for index, (reward, role) in enumerate(zip(rewards, roles, strict=True))
    )
    return PairDetail(number=7, total=9, pair=pair, messages=messages, responses=responses)


def test_chosen_and_rejected_come_first_and_are_named_then_the_others_by_reward() -> None:
    found = detail("a")
    assert [one.index for one in panels.ranked(found.responses)] == [2, 0, 1, 3]
    html = panels.pair(found)
    assert html.index("thumb_up</i>chosen") < html.index("thumb_down</i>rejected")
    scale = panels.RewardScale.of(found)
    assert [scale.place(reward) for reward in (2.0, -1.0, 0.5, None)] == [100, 0, 50, 0]


def test_the_recipe_is_shown_whole() -> None:
    groups = dict(panels.recipe_groups(recipe("p.jsonl", "h.jsonl")))
    assert ("path", "p.jsonl") in groups["prompts"]
    assert ("groups.0", "n 2, temperature 1, top_p 1") in groups["sampling"]
    assert ("max_kl", "not set") in groups["gate"]
    assert ("learning_rate", "5e-07") in groups["dpo"]


def test_the_tiles_name_the_incumbent_there_is_now_and_not_the_one_before_a_rollback() -> None:
    record = IterationRecord(
        run_id="r", iteration=2, version="r/iter-2", incumbent="r/iter-1", serving="r/iter-2", decision="promoted",
        reasons=(), metrics=IterationMetrics(), decided_at="2026-11-24T00:00:00+00:00",
    )  # fmt: skip
    before = view(incumbent="r/iter-2", iterations=(IterationView(iteration=2, stages=(), record=record),))
    after = before.model_copy(update={"incumbent": "r/iter-1"})
    assert panels.run_tiles(after)[-1].note == "incumbent r/iter-1"
    assert run_page.history(after) != run_page.history(before)
