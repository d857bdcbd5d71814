"""The commands as a user meets them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from ratchet.cli.main import app
from ratchet.cli.models import read_items
from services.contracts.errors import InvalidInput
from services.contracts.health import ServiceHealth
from services.contracts.judgements import Judgement, Verdict
from services.contracts.runs import IterationMetrics, IterationRecord, IterationView, RunStatus, RunView
from tests.fixtures.orchestrator_stack import recipe

runner = CliRunner()


def commands(group: typer.Typer) -> list[list[str]]:
    found: list[list[str]] = []
    for name, command in get_command(group).commands.items():  # pyright: ignore[reportAttributeAccessIssue]
        nested = getattr(command, "commands", None)
        found += [[name, inner] for inner in nested] if nested else [[name]]
    return found


@pytest.mark.parametrize("command", [c for c in commands(app) if c != ["version"]], ids=" ".join)
def test_every_command_explains_itself_with_an_example(command: list[str]) -> None:
    said = runner.invoke(app, [*command, "--help"])
    assert said.exit_code == 0
    assert f"Example: ratchet {' '.join(command)}" in " ".join(said.output.split())


@pytest.mark.parametrize(
    "command", [["status"], ["runs"], ["watch", "r"], ["scorers"], ["services"], ["generate", "hi"]]
)
def test_without_a_stack_there_is_one_clear_message(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = runner.invoke(app, command)
    assert said.exit_code == 1
    assert "no stack is running" in said.stderr
    assert "ratchet up" in said.stderr
    assert "Traceback" not in said.output


def test_usage_errors_exit_with_2() -> None:
    assert runner.invoke(app, ["run"]).exit_code == 2
    assert runner.invoke(app, ["score"]).exit_code == 2
    assert runner.invoke(app, ["train", "import", "x", "--kind", "cat", "--name", "y"]).exit_code == 2
    assert runner.invoke(app, ["nonsense"]).exit_code == 2


def test_a_wrong_query_of_pairs_is_a_usage_error_that_names_the_option() -> None:
    for option, value in (("--sort", "beauty"), ("--min-margin", "nan"), ("--search", "x" * 201)):
        said = runner.invoke(app, ["pairs", "r", "-t", "1", option, value])
        assert said.exit_code == 2
        assert option in said.stderr


class FakeClient:
    """What the commands ask of a client."""

    def __init__(self, **answers: object) -> None:
        self.answers = answers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def __getattr__(self, name: str) -> Callable[..., object]:
        return lambda *_, **__: self.answers[name]


def use(monkeypatch: pytest.MonkeyPatch, **answers: object) -> None:
    monkeypatch.setattr("ratchet.client.RatchetClient.find", lambda *_: FakeClient(**answers))


def test_services_are_a_table_and_the_exit_code_says_whether_all_are_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = ServiceHealth(name="reward", url="http://r", state="ready", serving=("default: models/rm",), seconds=0.012)
    gone = ServiceHealth(name="generator", url="http://g", state="unreachable", detail="no answer within 3 s")
    use(monkeypatch, services=[ready])
    said = runner.invoke(app, ["services"])
    assert (said.exit_code, "default: models/rm" in said.output, "12 ms" in said.output) == (0, True, True)
    use(monkeypatch, services=[ready, gone])
    said = runner.invoke(app, ["services"])
    assert said.exit_code == 1
    assert "no answer within 3 s" in said.output
    assert json.loads(runner.invoke(app, ["services", "--json"]).output)[1]["state"] == "unreachable"


def run_view(*judgements: Judgement) -> RunView:
    record = IterationRecord(
        run_id="r", iteration=1, version="r/iter-1", incumbent="models/sft", serving="r/iter-1", decision="promoted",
        reasons=("passed",), metrics=IterationMetrics(), decided_at="2026-11-24",
    )  # fmt: skip
    return RunView(
        id="r", status=RunStatus.IDLE, created_at="2026-11-24", recipe=recipe("datasets/a", "datasets/b"),
        iterations_asked=1, iterations_decided=1, incumbent="r/iter-1",
        iterations=(IterationView(iteration=1, stages=(), record=record, judgements=judgements),),
    )  # fmt: skip


def test_show_has_a_column_for_a_judge_only_when_one_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = Verdict(win_rate=0.625, against="incumbent", prompts=10)
    use(monkeypatch, run=run_view(Judgement(judge="gold", verdict=verdict, judged_at="2026-11-24")))
    said = runner.invoke(app, ["show", "r"]).output
    assert "gold" in said
    assert "62 % vs inc" in said
    use(monkeypatch, run=run_view())
    assert "vs inc" not in runner.invoke(app, ["show", "r"]).output.replace("win vs inc", "")


def test_rows_to_score_are_read_whole_and_a_broken_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes('{"prompt": "a\u2028b", "response": "c\u0085d"}\n'.encode())
    (item,) = read_items(file)
    assert (item.messages[0].content, item.responses) == ("a\u2028b", ("c\u0085d",))
    file.write_bytes(b'{"prompt": "a", "response": "b"}\n{"prompt": "\xff", "response": "b"}\n')
    with pytest.raises(InvalidInput, match=r"line 2: .*UnicodeDecodeError"):
        read_items(file)


def test_down_without_a_stack_is_fine(tmp_path: Path) -> None:
    said = runner.invoke(app, ["down", "--dir", str(tmp_path)])
    assert said.exit_code == 0


def test_help_loads_neither_contracts_nor_http() -> None:
    heavy = ("pydantic", "httpx", "fastapi", "redis", "psutil")
    code = f"import sys, ratchet.cli.main; print(*sorted(sys.modules.keys() & {set(heavy)!r}))"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert said.stdout.split() == []
