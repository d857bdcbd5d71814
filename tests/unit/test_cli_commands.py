"""The commands as a user meets them."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from ratchet.cli.main import app
from ratchet.cli.models import read_items
from services.contracts.errors import InvalidInput

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


@pytest.mark.parametrize("command", [["status"], ["runs"], ["watch", "r"], ["scorers"], ["generate", "hi"]])
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
