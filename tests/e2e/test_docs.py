"""The commands of the documents, as they stand and in the order they are read, on a real stack."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.doc_commands import ROOT, check_blocks

pytestmark = pytest.mark.timeout(1800)  # 3 minutes on an idle machine; every job waits for imports on a busy one

STOP_SECONDS = 120
GIVEN = ("recipes", "examples", "services", "ratchet", "docs", "scripts", "deploy", "Makefile", "pyproject.toml")
"""What of a checkout the commands may name; the rest of the folder is theirs."""


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    """A folder that looks like the root of a checkout, so that `.ratchet/` and data files lie apart from ours."""
    for name in GIVEN:
        if (ROOT / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    rows = [arithmetic(i) for i in range(60)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:48]))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[48:]))
    yield tmp_path
    # A block that failed half-way leaves its stack; `ratchet down` of a stopped one is fine.
    subprocess.run(
        ["ratchet", "down"], cwd=tmp_path, env=environment(tmp_path), timeout=STOP_SECONDS, check=False
    )  # fmt: skip


def arithmetic(i: int) -> dict[str, str]:
    """A row in the form of GSM8K's, which the quickstart asks its reader to fetch."""
    a, b = 3 + i, 2 + 7 * i % 23
    question = f"Ann has {a} apples and gets {b} more. How many apples does she have?"
    return {"question": question, "answer": f"She has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} apples.\n#### {a + b}"}


def environment(home: Path) -> dict[str, str]:
    """A reader's: the virtual environment is active, and no variable of ours is set."""
    kept = {name: value for name, value in os.environ.items() if not re.match(r"(RATCHET|REDIS)_", name)}
    binaries = str(Path(sys.executable).parent)
    return {**kept, "PATH": f"{binaries}:{kept['PATH']}", "HF_HOME": str(home / "hub"), "COLUMNS": "120"}


def test_every_command_for_a_local_stack_works_as_it_stands(checkout: Path) -> None:
    check_blocks("local", checkout, environment(checkout))
    assert not (checkout / ".ratchet" / "stack.json").exists(), "the last block stops the stack"
