"""Every command in the documents has somebody who runs it, and is right as far as can be seen without running it."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from ratchet.cli.main import app
from tests.fixtures.doc_commands import (
    COMPOSE_DOCUMENTS,
    LOCAL_DOCUMENTS,
    ROOT,
    SETUP_COMMANDS,
    BadBlock,
    Block,
    blocks,
    blocks_of,
    commands,
    documents,
    script,
)

ALL = [block for document in documents() for block in blocks_of(document)]
SHELL = [block for block in ALL if block.language == "bash"]
TARGETS = frozenset(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
MAX_SHOWN = 8
"""Blocks that nobody runs are exceptions; more of them is a reason to find a way."""


def named(block: Block) -> str:
    return block.where


def words_of(block: Block, program: str) -> list[list[str]]:
    return [words for words in commands(block.text) if words[0] == program]


def test_there_are_commands_for_every_runner() -> None:
    assert blocks("local")
    assert blocks("compose")
    assert blocks("setup")


def test_blocks_that_nobody_runs_are_few_and_give_their_reason() -> None:
    shown = [block for block in ALL if block.runner is None]
    assert all(block.why and len(block.why) > 10 for block in shown)
    assert len(shown) <= MAX_SHOWN, [block.where for block in shown]


@pytest.mark.parametrize("block", SHELL, ids=named)
def test_a_shell_block_has_no_syntax_error(block: Block) -> None:
    checked = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("block", [block for block in ALL if block.language == "python"], ids=named)
def test_a_python_block_compiles(block: Block) -> None:
    ast.parse(block.text)


@pytest.mark.parametrize("block", [b for b in SHELL if words_of(b, "ratchet")], ids=named)
def test_the_command_line_takes_every_ratchet_command_as_it_stands(block: Block) -> None:
    for words in words_of(block, "ratchet"):
        parse(words[1:])


def parse(words: list[str]) -> None:
    """Parse as the command line would, down to the options of the last subcommand. Raises typer's usage errors."""
    command, context, rest, name = typer.main.get_command(app), None, words, "ratchet"
    while True:
        context = command.make_context(name, rest, parent=context)
        if not hasattr(command, "resolve_command"):
            return
        inner = [*context._protected_args, *context.args]
        assert inner, f"{' '.join(words)}: names no command"
        name, found, rest = command.resolve_command(context, inner)  # pyright: ignore[reportAttributeAccessIssue]
        assert found is not None, f"{' '.join(words)}: there is no command {inner[0]!r}"
        command, name = found, str(name)


@pytest.mark.parametrize("words", [["ru"], ["run", "--polcy", "x"], ["train", "sft", "--base", "b"], ["show"]])
def test_a_ratchet_command_that_does_not_exist_is_found(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|missing|names no command"):
        parse(words)


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_make_target_and_ratchet_command_named_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    spans = re.findall(r"`([^`\n]+)`", text) + [block.text for block in blocks_of(document)]
    group = typer.main.get_command(app)
    for span in spans:
        for target in re.findall(r"(?:^|[\s;&])make ([a-z][a-z0-9-]*)", span):
            assert target in TARGETS, f"`{span}`: the Makefile has no target {target!r}"
        for name in re.findall(r"^ratchet ([a-z][a-z-]*)", span):
            assert name in group.commands, f"`{span}`: there is no command {name!r}"  # pyright: ignore


@pytest.mark.parametrize("block", [b for b in SHELL if b.runner == "setup"], ids=named)
def test_a_setup_block_holds_only_what_the_checks_run_themselves(block: Block) -> None:
    for words in commands(block.text):
        assert " ".join(words) in SETUP_COMMANDS, f"{block.where}: {' '.join(words)} is run by nobody"


@pytest.mark.parametrize("block", [b for b in SHELL if words_of(b, "docker")], ids=named)
def test_every_compose_command_names_services_and_files_that_exist(block: Block) -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    for words in words_of(block, "docker"):
        assert words[1] == "compose", words
        rest = words[2:]
        while rest and rest[0] in ("-f", "--profile"):
            assert rest[0] != "-f" or (ROOT / rest[1]).is_file(), words
            rest = rest[2:]
        verb, rest = rest[0], [word for word in rest[1:] if not word.startswith("-")]
        assert verb in (
            "up",
            "down",
            "run",
            "exec",
            "logs",
            "ps",
            "stop",
            "start",
            "restart",
            "build",
            "pull",
            "config",
        )
        if verb in ("run", "exec"):
            assert set(rest) & set(services), words
        elif verb in ("logs", "stop", "start", "restart"):
            assert set(rest) <= set(services), words


def test_the_runners_documents_exist() -> None:
    assert all((ROOT / name).is_file() for name in (*LOCAL_DOCUMENTS, *COMPOSE_DOCUMENTS))


# -- the reader of the documents itself -------------------------------------------------------------------------------


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Text.\n```bash\nls\n```\n", "has to say who runs it"),
        ("<!-- run: somebody -->\n```bash\nls\n```\n", "nobody is called 'somebody'"),
        ("<!-- shown: -->\n```bash\nls\n```\n", "has to say who runs it"),
        ("<!-- run: local -->\n```console\n$ ls\n```\n", "not ```console"),
        ("<!-- run: local -->\n```bash\nls\n", "not closed"),
    ],
)
def test_a_block_that_nobody_would_run_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BadBlock, match=re.escape(said)):
        blocks_of(written(tmp_path, text), "page.md")


def test_blocks_are_read_with_their_runner(tmp_path: Path) -> None:
    text = "<!-- run: local -->\n\n```bash\nls \\\n  -l\n```\n"
    text += "<!-- shown: needs a GPU -->\n```python\n1\n```\n```toml\na=1\n```\n"
    first, second = blocks_of(written(tmp_path, text), "page.md")
    assert (first.runner, first.text, first.line) == ("local", "ls \\\n  -l", 3)
    assert (second.runner, second.why, second.language) == (None, "needs a GPU", "python")


def test_a_program_of_blocks_keeps_variables_and_stops_at_the_first_failure(tmp_path: Path) -> None:
    def block(text: str, language: str = "bash") -> Block:
        return Block("page.md", 1, language, text, "local")

    program = script(
        [block("export A=1"), block("import os; print(os.environ['A'])", "python"), block("false; echo no")]
    )
    ended = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "1\n")
    assert "::: page.md:1" in ended.stderr


def test_commands_are_taken_out_of_pipes_lists_and_substitutions() -> None:
    text = "A=1 ratchet up -d && ratchet show x | head  # what's up\nexport T=$(sed -n p .env)\n"
    text += 'curl -d \'{"a": "b;\n# c"}\' u \\\n  -s'
    assert list(commands(text)) == [
        ["ratchet", "up", "-d"],
        ["ratchet", "show", "x"],
        ["head"],
        ["export", "T=$"],
        ["sed", "-n", "p", ".env"],
        ["curl", "-d", '{"a": "b;\n# c"}', "u", "-s"],
    ]
