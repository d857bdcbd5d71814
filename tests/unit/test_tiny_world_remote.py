"""The tiny world on a running stack: nothing starts half, a known run is followed, each iteration is judged."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import stamina
from rich.console import Console

from examples.tiny_world import remote
from examples.tiny_world.judge import GoldJudge
from examples.tiny_world.judging import GoldJudging, iteration_reports, pick_examples
from examples.tiny_world.loop import continue_run, find_run
from examples.tiny_world.progress import Progress
from examples.tiny_world.settings import TinyWorldSettings
from examples.tiny_world.world import World
from services.contracts.conversations import Message
from services.contracts.errors import Conflict, NotFound, Unavailable
from services.contracts.judgements import Verdict
from services.contracts.recipes import Recipe
from services.contracts.rollouts import Response, Rollout
from services.contracts.runs import (
    IterationMetrics,
    IterationRecord,
    IterationView,
    RolloutPage,
    RunStatus,
    RunView,
    ScoredRollout,
)

VARIABLES = (
    "RATCHET_URL", "RATCHET_ORCHESTRATOR_URL", "RATCHET_GENERATOR_URL", "RATCHET_REWARD_URL", "RATCHET_TRAINER_URL",
    "RATCHET_TOKEN", "RATCHET_STORE_URL",
)  # fmt: skip
CLOSED = "http://127.0.0.1:1"
"""Port 1 is never listened on by a test machine: connecting is refused at once."""


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def name_a_stack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for service in ("URL", "GENERATOR_URL", "REWARD_URL", "TRAINER_URL"):
        monkeypatch.setenv(f"RATCHET_{service}", CLOSED)
    monkeypatch.setenv("RATCHET_TOKEN", "t")
    monkeypatch.setenv("RATCHET_STORE_URL", str(tmp_path / "store"))


def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What the command says when it refuses: exit code 1, one line on stderr, nothing built."""
    code = remote.main(["--folder", str(tmp_path / "world"), "--dir", str(tmp_path / "none"), *options])
    said = capsys.readouterr().err
    assert code == 1
    assert said.startswith("error: ")
    assert len(said.strip().splitlines()) == 1, said
    assert not list((tmp_path / "world").glob("world-*"))
    return said


def test_without_a_stack_it_says_how_to_get_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(tmp_path, capsys)
    assert "no stack is running" in said
    assert "RATCHET_URL" in said


def test_every_url_that_is_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name_a_stack(monkeypatch, tmp_path)
    monkeypatch.delenv("RATCHET_TRAINER_URL")
    monkeypatch.delenv("RATCHET_STORE_URL")
    said = refusal(tmp_path, capsys)
    assert "RATCHET_TRAINER_URL" in said
    assert "RATCHET_STORE_URL" in said
    assert "RATCHET_REWARD_URL" not in said


def test_without_a_token_nothing_is_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name_a_stack(monkeypatch, tmp_path)
    monkeypatch.delenv("RATCHET_TOKEN")
    assert "RATCHET_TOKEN" in refusal(tmp_path, capsys)


def test_a_stack_that_does_not_answer_is_told_before_a_world_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name_a_stack(monkeypatch, tmp_path)
    with stamina.set_testing(True):
        said = refusal(tmp_path, capsys)
    assert f"orchestrator at {CLOSED} cannot be reached" in said


@pytest.mark.parametrize("options", [["--iterations", "0"], ["--run-id", "a/b"], ["--iteration-s", "1"]])
def test_a_wrong_option_ends_with_its_name(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        remote.parse(options)
    assert ended.value.code == 2
    assert options[0] in capsys.readouterr().err


def make_recipe(seed: int = 0) -> Recipe:
    return Recipe.model_validate(
        {
            **TinyWorldSettings.read(seed, small=True).run,
            "policy": "models/sft",
            "reward_model": "models/rm",
            "prompts": {"path": "datasets/a.jsonl"},
            "heldout": {"path": "datasets/b.jsonl"},
            "iterations": 2,
            "seed": seed,
        }
    )


class Stack:
    """The client's methods that the loop uses, on a run in memory: what the orchestrator would answer."""

    def __init__(self, view: RunView | None = None) -> None:
        self.view = view
        self.calls: list[Any] = []
        self.verdicts: dict[int, Verdict] = {}
        self.rollouts_of: dict[int, tuple[Rollout, ...]] = {}
        self.down = False

    def run(self, id: str) -> RunView:
        if self.down:
            raise Unavailable("the orchestrator cannot be reached")
        if self.view is None:
            raise NotFound(f"no run {id!r}")
        return self.view

    def trigger(self, id: str, count: int) -> None:
        self.calls.append(("trigger", id, count))

    def resume(self, id: str) -> None:
        self.calls.append(("resume", id))

    def rollouts(self, id: str, iteration: int, *, evaluation: bool, offset: int, limit: int) -> RolloutPage:
        assert evaluation, "only held-out responses are judged"
        rows = tuple(ScoredRollout(rollout=rollout) for rollout in self.rollouts_of[iteration])
        return RolloutPage(total=len(rows), offset=offset, rows=rows[offset : offset + min(limit, 2)])

    def judge(self, run: str, iteration: int, judge: str, verdict: Verdict) -> None:
        assert judge == "gold"
        if self.verdicts.setdefault(iteration, verdict) != verdict:
            raise Conflict("judged already, differently")


def make_view(status: RunStatus = RunStatus.IDLE, decided: int = 2, asked: int = 2, seed: int = 0) -> RunView:
    records = [
        IterationRecord(
            run_id="tiny-world",
            iteration=number,
            version=f"tiny-world/iter-{number}",
            incumbent="models/sft",
            serving="models/sft",
            decision="promoted" if number else "baseline",
            reasons=("passed",),
            metrics=IterationMetrics(proxy_reward=0.5, response_tokens=9.0),
            decided_at="2026-01-01T00:00:00Z",
        )
        for number in range(decided + 1)
    ]
    return RunView(
        id="tiny-world", status=status, created_at="2026-01-01T00:00:00Z", recipe=make_recipe(seed),
        iterations_asked=asked, iterations_decided=decided, incumbent=None,
        iterations=tuple(IterationView(iteration=r.iteration, stages=(), record=r) for r in records),
    )  # fmt: skip


def test_a_run_that_is_there_is_found_whatever_number_of_iterations_is_asked_for() -> None:
    stack: Any = Stack(make_view())
    more = make_recipe().model_copy(update={"iterations": 5})
    assert find_run(stack, "tiny-world", more) is stack.view
    assert find_run(Stack(), "tiny-world", more) is None  # pyright: ignore[reportArgumentType]


def test_a_run_of_another_seed_is_refused_with_the_remedy() -> None:
    stack: Any = Stack(make_view(seed=1))
    with pytest.raises(Conflict, match="--run-id"):
        find_run(stack, "tiny-world", make_recipe(seed=0))


@pytest.mark.parametrize(
    ("status", "iterations", "calls", "said"),
    [
        (RunStatus.IDLE, 2, [], "it has ended: 2 iterations. More: --iterations 3"),
        (RunStatus.IDLE, 5, [("trigger", "tiny-world", 3)], "3 more iterations"),
        (RunStatus.RUNNING, 1, [], "it is running"),
        (RunStatus.FAILED, 2, [("resume", "tiny-world")], "it was failed, and goes on"),
        (RunStatus.PAUSED, 3, [("resume", "tiny-world"), ("trigger", "tiny-world", 1)], "1 more iterations"),
    ],
)
def test_a_second_start_goes_on_with_the_run_and_says_how(
    status: RunStatus, iterations: int, calls: list[Any], said: str
) -> None:
    stack: Any = Stack()
    assert said in continue_run(stack, make_view(status), iterations)
    assert stack.calls == calls


@pytest.fixture
def stack() -> Stack:
    """Two iterations of four questions: the SFT model evades, the first iteration answers all, the second none."""
    world = World()
    questions = world.held_out_questions()[:4]
    made = Stack(make_view(decided=2))

    def rollouts(iteration: int, right: bool) -> tuple[Rollout, ...]:
        return tuple(
            Rollout(
                prompt_id=f"p{i}",
                messages=(Message(role="user", content=q.text),),
                prompt_token_ids=(1,),
                responses=(response_of(q, world, right),),
                policy_version=f"tiny-world/iter-{iteration}",
            )
            for i, q in enumerate(questions)
        )

    made.rollouts_of = {0: rollouts(0, False), 1: rollouts(1, True), 2: rollouts(2, False)}
    return made


def response_of(question: Any, world: World, right: bool) -> Response:
    text = f"It is the {world.facts[question.town, question.attribute]}." if right else "Who knows?"
    return Response(
        text=text, token_ids=(1, 2), logprob=-1.0, finish_reason="stop", temperature=1.0, top_p=1.0, seed=0, index=0
    )


def judging_of(stack: Stack) -> tuple[GoldJudging, io.StringIO]:
    out = io.StringIO()
    client: Any = stack
    return GoldJudging(client, "tiny-world", GoldJudge.from_seed(0), Progress(Console(file=out, width=200))), out


def test_each_iteration_s_verdict_is_posted_as_it_is_decided(stack: Stack) -> None:
    judging, out = judging_of(stack)
    stack.view = make_view(RunStatus.RUNNING, decided=1)
    judging.once()
    assert sorted(stack.verdicts) == [0, 1]
    assert stack.verdicts[0].win_rate == 0.5, "the baseline is the SFT model itself"
    assert stack.verdicts[1].win_rate == 1.0
    assert stack.verdicts[1].prompts == 4
    assert "iteration 1 wins 100%" in out.getvalue()
    stack.view = make_view(decided=2)
    judged = judging.finish()
    assert stack.verdicts[2].win_rate == 0.5
    assert [row.gold_win_rate for row in iteration_reports(judged)] == [0.5, 1.0, 0.5]
    assert pick_examples(judged)[0].before == "Who knows?"


def test_an_outage_while_judging_is_made_up_for(stack: Stack) -> None:
    judging, _ = judging_of(stack)
    stack.down = True
    judging.once()
    assert stack.verdicts == {}
    stack.down = False
    assert len(judging.finish()) == 3
    assert sorted(stack.verdicts) == [0, 1, 2]


def test_an_earlier_verdict_stays_and_is_said_to(stack: Stack) -> None:
    stack.verdicts[1] = Verdict(win_rate=0.25, prompts=4)
    judging, out = judging_of(stack)
    judging.finish()
    assert stack.verdicts[1].win_rate == 0.25
    assert "earlier verdict of iteration 1 stays" in out.getvalue()
