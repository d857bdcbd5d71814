"""The demo's report says the same in the terminal, in HTML and in JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from examples.tiny_world.remote import save
from examples.tiny_world.report import (
    DemoReport,
    Example,
    IterationReport,
    Traffic,
    print_report,
    read_json,
    write_html,
    write_json,
)


@pytest.fixture
def report() -> DemoReport:
    def row(number: int, decision: str, win: float) -> IterationReport:
        return IterationReport(
            name="SFT" if number == 0 else f"iter {number}",
            version=f"demo/iter-{number}",
            decision=decision,
            proxy_reward=0.5 * number,
            gold_utility=0.4 + 0.1 * number,
            gold_win_rate=win,
            gold_win_rate_ci=(win - 0.05, win + 0.05),
            response_tokens=20.0,
            kl=None if number == 0 else 1.5 * number,
            seconds_by_stage={"sample": 12.3, "train": 8.0},
        )

    return DemoReport(
        seed=0,
        seconds=321.0,
        peak_memory_bytes=5 << 30,
        vllm_starts=1,
        swap_seconds=(0.4, 0.9),
        heldout_prompts=200,
        setup_seconds={"sft": 60.0},
        iterations=(row(0, "baseline", 0.5), row(1, "promoted", 0.7), row(2, "rejected", 0.6)),
        examples=(Example("Where is <b>Ada</b>?", "Dunno.", 0.1, "In Rome. Thank you.", 1.0),),
        traffic=Traffic(requests=40, failed=0, slowest_seconds=3.2, versions_seen=("a", "b")),
    )


def test_the_json_has_the_figures_under_their_documented_names(report: DemoReport, tmp_path: Path) -> None:
    write_json(report, tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert {"seconds", "peak_memory_bytes", "vllm_starts", "iterations"} <= set(data)
    assert {
        "version", "decision", "proxy_reward", "gold_utility", "gold_win_rate", "gold_win_rate_ci", "response_tokens",
        "kl", "seconds_by_stage",
    } <= set(data["iterations"][1])  # fmt: skip
    assert read_json(tmp_path / "report.json") == report


def test_the_terminal_shows_each_iteration_with_its_interval(report: DemoReport) -> None:
    out = io.StringIO()
    print_report(report, Console(file=out, width=160))
    text = out.getvalue()
    assert "70 % (65-75)" in text
    assert "rejected" in text
    assert "1 vLLM process from start to end" in text
    assert "2 swaps, the slowest 0.90 s" in text
    assert "In Rome. Thank you." in text


def test_the_page_is_self_contained_and_escapes_what_models_wrote(report: DemoReport, tmp_path: Path) -> None:
    write_html(report, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<b>Ada</b>" not in page
    assert "&lt;b&gt;Ada&lt;/b&gt;" in page
    assert "<svg" in page
    assert "src=" not in page
    assert "<link" not in page


def test_a_run_on_a_stack_says_where_its_figures_lie_and_where_it_can_be_looked_through(
    report: DemoReport, tmp_path: Path
) -> None:
    said = io.StringIO()
    save(report, tmp_path, "mine", Console(file=said, width=200))
    assert read_json(tmp_path / "report.json") == report
    assert str(tmp_path / "report.json") in said.getvalue()
    assert "mine in the orchestrator's dashboard, or 'ratchet show mine'" in said.getvalue()
