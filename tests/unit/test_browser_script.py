"""`scripts/browser.sh` finds a Chromium or says what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "browser.sh"


def run(path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    assert bash is not None
    return subprocess.run(
        [bash, SCRIPT], env={"PATH": str(path), **environment}, capture_output=True, text=True, check=False, timeout=30
    )


def test_without_browser_and_apt_it_says_how_to_get_one(tmp_path: Path) -> None:
    found = run(tmp_path)
    assert found.returncode == 1
    assert "there is no Chromium or Chrome on PATH" in found.stderr
    assert "apt-get install chromium" in found.stderr
    assert "command not found" not in found.stderr
    assert found.stdout == ""


@pytest.mark.parametrize("name", ["chromium", "google-chrome"])
def test_it_prints_the_browser_there_is(tmp_path: Path, name: str) -> None:
    browser = tmp_path / name
    browser.write_text("")
    os.chmod(browser, 0o755)
    found = run(tmp_path)
    assert (found.returncode, found.stdout.strip()) == (0, str(browser))


def test_a_browser_named_that_is_none_is_an_error(tmp_path: Path) -> None:
    found = run(tmp_path, RATCHET_BROWSER="/nowhere/chromium")
    assert found.returncode == 1
    assert "RATCHET_BROWSER=/nowhere/chromium is no program" in found.stderr
