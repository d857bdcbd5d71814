"""The demo's report: one table, the curves and a few answers, in the terminal, as HTML and as JSON."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from services.contracts.runs import Stage

MIB = 1 << 20
BAR_WIDTH = 25
SHORT = {"evaluate": "eval", "evaluate-score": "eval score"}
"""Stage names as the terminal's table heads them, to fit 80 columns."""


@dataclass(frozen=True)
class IterationReport:
    """One row of the table. Rewards are raw logits, lengths tokens, KL nats per response, times seconds."""

    name: str
    version: str
    decision: str
    proxy_reward: float
    gold_utility: float
    gold_win_rate: float
    gold_win_rate_ci: tuple[float, float]
    response_tokens: float
    kl: float | None
    seconds_by_stage: dict[str, float]


@dataclass(frozen=True)
class Example:
    """One held-out prompt with the answers before and after."""

    prompt: str
    before: str
    before_utility: float
    after: str
    after_utility: float


@dataclass(frozen=True)
class Traffic:
    """Requests from outside that ran all through the loop, swaps included."""

    requests: int = 0
    failed: int = 0
    slowest_seconds: float = 0.0
    versions_seen: tuple[str, ...] = ()


@dataclass(frozen=True)
class DemoReport:
    """Everything the demo found out. Memory and vLLM starts are None on a stack that somebody else started."""

    seed: int
    seconds: float
    peak_memory_bytes: int | None
    vllm_starts: int | None
    swap_seconds: tuple[float, ...]
    heldout_prompts: int
    setup_seconds: dict[str, float]
    iterations: tuple[IterationReport, ...]
    examples: tuple[Example, ...] = ()
    traffic: Traffic = field(default_factory=Traffic)


def write_json(report: DemoReport, path: Path) -> None:
    """The figures as JSON; per iteration under the names of `IterationReport`."""
    path.write_text(json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> DemoReport:
    """A report written by `write_json`."""
    data = json.loads(path.read_text(encoding="utf-8"))
    data["iterations"] = tuple(
        IterationReport(**{**row, "gold_win_rate_ci": tuple(row["gold_win_rate_ci"])}) for row in data["iterations"]
    )
    data["examples"] = tuple(Example(**row) for row in data["examples"])
    traffic = data["traffic"]
    data["traffic"] = Traffic(**{**traffic, "versions_seen": tuple(traffic["versions_seen"])})
    data["swap_seconds"] = tuple(data["swap_seconds"])
    return DemoReport(**data)


def headline(report: DemoReport) -> str:
    """What happened, in a few words; by the judge, not by hope."""
    promoted = [it.gold_utility for it in report.iterations if it.decision == "promoted"]
    better = bool(promoted) and promoted[-1] > report.iterations[0].gold_utility
    return "A policy that gets better" if better else "A policy that did not get better"


HEADERS = ("", "decision", "proxy", "gold utility", "gold win rate vs SFT", "tokens", "KL")


def rows(report: DemoReport) -> list[tuple[str, ...]]:
    """The table's cells, as text."""
    return [
        (
            it.name,
            it.decision,
            f"{it.proxy_reward:+.2f}",
            f"{it.gold_utility:.3f}",
            "50 %" if it.decision == "baseline" else _percent(it),
            f"{it.response_tokens:.1f}",
            "-" if it.kl is None else f"{it.kl:.2f}",
        )
        for it in report.iterations
    ]


def stage_rows(report: DemoReport) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells of the second table: seconds each stage took, first job's start to last job's end."""
    stages = [s.value for s in Stage if any(s.value in it.seconds_by_stage for it in report.iterations)]
    cells = [
        (it.name, *(f"{it.seconds_by_stage[s]:.1f}" if s in it.seconds_by_stage else "" for s in stages))
        for it in report.iterations
    ]
    return ("seconds", *stages), cells


def _percent(it: IterationReport) -> str:
    low, high = it.gold_win_rate_ci
    return f"{100 * it.gold_win_rate:.0f} % ({100 * low:.0f}-{100 * high:.0f})"


def facts(report: DemoReport) -> list[str]:
    """What else was measured, a sentence each."""
    told = [f"{report.seconds:.0f} seconds in all"]
    if report.peak_memory_bytes is not None:
        told[0] += f"; at most {report.peak_memory_bytes / MIB:,.0f} MiB of memory for all processes together"
    if report.vllm_starts is not None:
        told.append(f"{report.vllm_starts} vLLM process from start to end")
    if report.swap_seconds:
        told.append(f"{len(report.swap_seconds)} swaps, the slowest {max(report.swap_seconds):.2f} s")
    if report.traffic.requests:
        told.append(
            f"{report.traffic.requests} chat requests from outside during the loop, {report.traffic.failed} failed; "
            f"answered by {len(report.traffic.versions_seen)} versions"
        )
    told.append(
        f"judged on {report.heldout_prompts} held-out prompts: unseen wordings, entities never used in the loop"
    )
    told.append("proxy: mean raw reward; win rate: ties count half, with its 95 % interval; KL: nats per response")
    return told


def print_report(report: DemoReport, console: Console) -> None:
    """Table, curves and answers for a terminal."""
    table = Table(title=headline(report), title_style="bold", header_style="bold", box=SIMPLE_HEAD)
    for index, name in enumerate(HEADERS):
        table.add_column(name, justify="right" if index >= 2 else "left", overflow="fold")
    for row, it in zip(rows(report), report.iterations, strict=True):
        table.add_row(*row, style={"promoted": "green", "rejected": "red"}.get(it.decision, ""))
    console.print(table)
    header, cells = stage_rows(report)
    stages = Table(header_style="dim", box=None, pad_edge=False)
    for index, name in enumerate(header):
        stages.add_column(SHORT.get(name, name), justify="right" if index else "left", style="dim", no_wrap=True)
    for cell in cells:
        stages.add_row(*cell)
    console.print(Padding(stages, (0, 0, 1, 2)))
    for fact in facts(report):
        console.print(Padding(Text(fact), (0, 0, 0, 2)))
    console.print(Padding(_curve(report), (1, 2)))
    for example in report.examples:
        body = Group(
            Text.assemble(("before  ", "red"), example.before, (f"  [gold {example.before_utility:.2f}]", "dim")),
            Text.assemble(("after   ", "green"), example.after, (f"  [gold {example.after_utility:.2f}]", "dim")),
        )
        console.print(Panel(body, title=Text(example.prompt, style="bold"), title_align="left"))


def _curve(report: DemoReport) -> Table:
    """The two gold figures as bars from 0 to 1, an iteration a line."""
    chart = Table.grid(padding=(0, 1))
    chart.add_row("", Text("gold utility", style="bold"), "", Text("gold win rate vs SFT", style="bold"), "")
    for it in report.iterations:
        chart.add_row(
            it.name,
            Bar(1.0, 0.0, it.gold_utility, width=BAR_WIDTH, color="cyan"),
            f"{it.gold_utility:.2f}",
            Bar(1.0, 0.0, it.gold_win_rate, width=BAR_WIDTH, color="green"),
            f"{it.gold_win_rate:.2f}",
        )
    return chart


def curves_svg(report: DemoReport) -> str:
    """The curves as an SVG element: gold win rate and utility, proxy reward, length and KL over the iterations."""
    import matplotlib  # heavy, and only the HTML needs it

    matplotlib.use("svg")
    from matplotlib import pyplot

    names = [it.name for it in report.iterations]
    x = list(range(len(names)))
    figure, axes = pyplot.subplots(1, 4, figsize=(13, 3), layout="constrained")
    win = [100 * it.gold_win_rate for it in report.iterations]
    below = [100 * (it.gold_win_rate - it.gold_win_rate_ci[0]) for it in report.iterations]
    above = [100 * (it.gold_win_rate_ci[1] - it.gold_win_rate) for it in report.iterations]
    axes[0].errorbar(x, win, yerr=[below, above], marker="o", capsize=3)
    axes[0].axhline(50, color="gray", linewidth=0.8, linestyle="--")
    axes[0].set_ylim(0, 100)
    panels: Sequence[tuple[str, list[float | None]]] = (
        ("gold utility", [it.gold_utility for it in report.iterations]),
        ("proxy reward (raw logit)", [it.proxy_reward for it in report.iterations]),
        ("KL to SFT (nats)", [it.kl for it in report.iterations]),
    )
    axes[0].set_title("gold win rate vs SFT (%)", fontsize=10)
    for axis, (title, values) in zip(axes[1:], panels, strict=True):
        axis.plot(x, [float("nan") if value is None else value for value in values], marker="o")
        axis.set_title(title, fontsize=10)
    for axis in axes:
        axis.set_xticks(x, names)
        axis.grid(alpha=0.3)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Ratchet: the tiny world</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #b42318; }}
@media (prefers-color-scheme: dark) {{ :root {{ --good: #4ac26b; --bad: #ff7b72; }} figure {{ background: #fff; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ margin-bottom: .2rem; }} .sub {{ opacity: .75; margin-top: 0; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .35rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }}
td.n, th.n {{ text-align: right; white-space: nowrap; }} .stages {{ font-size: .85em; opacity: .85; }}
.promoted {{ color: var(--good); font-weight: 600; }} .rejected {{ color: var(--bad); font-weight: 600; }}
figure {{ margin: 1.5rem 0; padding: .5rem; border-radius: .5rem; }} figure svg {{ width: 100%; height: auto; }}
.example {{ border-left: 3px solid var(--line); padding: .1rem 1rem; margin: 1rem 0; }}
.example q {{ quotes: none; }} .tag {{ display: inline-block; width: 4.2rem; font-weight: 600; }}
.after .tag {{ color: var(--good); }} .before .tag {{ color: var(--bad); }} .mark {{ opacity: .65; font-size: .85em; }}
</style></head><body>
<h1>{headline}</h1>
<p class="sub">Online iterative RLHF in a tiny world: SFT, a reward model from noisy labels, {count} iterations of DPO.
Seed {seed}. The gold judge knows the truth; the loop never saw it.</p>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
<figure>{curves}</figure>
<ul>{facts}</ul>
<h2>The same questions, before and after</h2>
{examples}
<h2>Where the time went</h2>
<div class="scroll"><table class="stages">{stages}</table></div>
</body></html>
"""


def write_html(report: DemoReport, path: Path) -> None:
    """The report as one self-contained page, readable on a phone, in light and dark."""

    def cell(index: int, text: str, decision: str) -> str:
        kind = "n" if index >= 2 else decision if index == 1 else ""
        return f'<td class="{kind}">{html.escape(text)}</td>'

    body = "".join(
        "<tr>" + "".join(cell(i, text, it.decision) for i, text in enumerate(row)) + "</tr>"
        for row, it in zip(rows(report), report.iterations, strict=True)
    )
    examples = "".join(
        f'<div class="example"><p><strong>{html.escape(e.prompt)}</strong></p>'
        f'<p class="before"><span class="tag">before</span><q>{html.escape(e.before)}</q> '
        f'<span class="mark">gold {e.before_utility:.2f}</span></p>'
        f'<p class="after"><span class="tag">after</span><q>{html.escape(e.after)}</q> '
        f'<span class="mark">gold {e.after_utility:.2f}</span></p></div>'
        for e in report.examples
    )
    header, cells = stage_rows(report)
    stages = "".join(
        "<tr>"
        + "".join(f'<{tag} class="{"n" if i else ""}">{html.escape(c)}</{tag}>' for i, c in enumerate(row))
        + "</tr>"
        for tag, row in [("th", header), *(("td", row) for row in cells)]
    )
    page = PAGE.format(
        headline=headline(report),
        count=len(report.iterations) - 1,
        seed=report.seed,
        head="".join(f'<th class="{"n" if i >= 2 else ""}">{html.escape(h)}</th>' for i, h in enumerate(HEADERS)),
        body=body,
        stages=stages,
        curves=curves_svg(report),
        facts="".join(f"<li>{html.escape(fact)}</li>" for fact in facts(report)),
        examples=examples,
    )
    path.write_text(page, encoding="utf-8")
