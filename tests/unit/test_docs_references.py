"""What the documents name exists: files, links, anchors, settings, metrics and alerts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.markdown import anchor
from scripts.reference_docs import all_metrics, full_name
from services.generator.settings import GeneratorSettings
from services.orchestrator.settings import OrchestratorSettings
from services.reward.settings import RewardSettings
from services.trainer.settings import TrainerSettings
from tests.fixtures.doc_commands import ROOT, documents

DOCUMENTS = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in documents()]
TOP = ("services", "ratchet", "examples", "docs", "tests", "scripts", "recipes", "deploy", "requirements", "bench")
VARIABLE = re.compile(r"\b(?:RATCHET|REDIS)_[A-Z0-9_]*[A-Z0-9]\b")
SOURCES = ("ratchet", "scripts", "services", "examples", "Makefile", *(path.name for path in ROOT.glob("*.yml")))
"""Besides the settings classes: what reads a variable of its own."""
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose(path: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """What can be linked to in a document: headings as GitHub names them, and ids."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+)$", prose(path), re.MULTILINE):
        name, count = anchor(re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)), 0
        while name + (f"-{count}" if count else "") in found:
            count += 1
        found.add(name + (f"-{count}" if count else ""))
    return found | set(re.findall(r'<a (?:id|name)="([^"]+)"', path.read_text(encoding="utf-8")))


def known_variables() -> set[str]:
    """Every variable that some part of the project reads."""
    settings = (OrchestratorSettings, GeneratorSettings, RewardSettings, TrainerSettings)
    names = {f"RATCHET_{name.upper()}" for kind in settings for name in kind.model_fields}
    for source in SOURCES:
        path = ROOT / source
        files = [path] if path.is_file() else [*path.rglob("*.py"), *path.rglob("*.sh")] if path.is_dir() else []
        for file in files:
            names.update(VARIABLE.findall(file.read_text(encoding="utf-8")))
    return names


@pytest.mark.parametrize("path", DOCUMENTS)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in LINK.findall(prose(path)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, fragment = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{target} is not there"
        if fragment:
            assert linked.suffix == ".md", target
            assert fragment in anchors(linked), f"{target}: {linked.name} has only {sorted(anchors(linked))}"


@pytest.mark.parametrize("path", DOCUMENTS)
def test_every_file_that_is_named_exists(path: Path) -> None:
    for span in re.findall(r"`([^`\n]+)`", prose(path)):
        if not re.match(rf"^({'|'.join(TOP)})/[\w./*{{}},-]+$", span):
            continue
        named = re.sub(r"\{[^}]*\}", "*", span).rstrip("/")
        assert (ROOT / named).exists() or any(ROOT.glob(named)), f"`{span}` is not there"


@pytest.mark.parametrize("path", DOCUMENTS)
def test_every_variable_that_is_named_is_read_by_something(path: Path) -> None:
    known = known_variables()
    for name in VARIABLE.findall(path.read_text(encoding="utf-8")):
        assert name in known, f"{name} is read by nothing"


@pytest.mark.parametrize("path", DOCUMENTS)
def test_every_metric_that_is_named_exists(path: Path) -> None:
    known = {full_name(metric) for _, metric in all_metrics()}
    series = {f"{name}{end}" for name in known for end in ("", "_bucket", "_sum", "_count")}
    for name in re.findall(r"\bratchet_(?:\w+_)+\w+\b", path.read_text(encoding="utf-8")):
        assert name in series, f"{name} is no metric"


def test_every_alert_has_its_section_and_every_section_its_alert() -> None:
    rules = ROOT / "deploy" / "prometheus" / "alerts.yml"
    alerts = set(re.findall(r"^\s*- alert: (\w+)", rules.read_text(encoding="utf-8"), re.MULTILINE))
    assert alerts
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    section = re.search(r"^## Alerts$(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert section
    assert set(re.findall(r"^### (\w+)$", section[1], re.MULTILINE)) == alerts


def test_an_anchor_is_what_github_makes_of_a_heading() -> None:
    assert anchor("POST /v1/runs/{run}/iterations") == "post-v1runsruniterations"
    assert anchor("What it does, and why") == "what-it-does-and-why"
