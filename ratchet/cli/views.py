"""Runs as tables and lines."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ratchet.cli import output
from services.contracts.judgements import Verdict
from services.contracts.runs import IterationRecord, IterationView, RunView, StageView


def current_iteration(view: RunView) -> IterationView | None:
    """The iteration that is worked on, else the last one."""
    undecided = [one for one in view.iterations if one.record is None and any(s.state != "waiting" for s in one.stages)]
    return undecided[0] if undecided else (view.iterations[-1] if view.iterations else None)


def headline(view: RunView) -> Text:
    """One line: run, status, how far, incumbent."""
    done = view.iterations_decided
    return Text.assemble(
        ("run ", "bold"), view.id, "  ", output.state(view.status.value),
        f"  {done} of {view.iterations_asked} iterations decided", f"  incumbent {view.incumbent or '-'}",
    )  # fmt: skip


def stage_progress(stage: StageView) -> str:
    """`12/64 items  3/8 chunks  230 tokens/s  20 s left  loss 0.61`."""
    parts: list[str] = []
    if stage.items_total:
        unit = "steps" if stage.stage.value == "train" else "prompts"
        parts.append(f"{stage.items_done}/{stage.items_total} {unit}")
    if stage.total > 1:
        parts.append(f"{stage.done}/{stage.total} chunks")
    if stage.tokens_per_second:
        parts.append(f"{stage.tokens_per_second:.0f} tokens/s")
    if stage.state == "running" and stage.seconds_left is not None:
        parts.append(f"{output.seconds(stage.seconds_left)} left")
    if stage.detail:
        parts.append(stage.detail)
    return "  ".join(parts)


def stages_table(iteration: IterationView) -> Table:
    """The stages of one iteration."""
    made = output.table("stage", "state", "time", "detail", right=("time",))
    for stage in iteration.stages:
        made.add_row(
            stage.stage.value, output.state(stage.state),
            output.seconds(stage.seconds) if stage.state != "waiting" else "", Text(stage_progress(stage)),
        )  # fmt: skip
    return made


def iterations_table(view: RunView) -> Table | None:
    """One line per decided iteration, with a column for each judge there is."""
    if not any(one.record for one in view.iterations):
        return None
    figures = (
        "reward", "±", "win vs ref", "win vs inc", "KL", "tokens", "pairs", "dpo loss", "dpo acc", "time",
    )  # fmt: skip
    judges = sorted({one.judge for iteration in view.iterations for one in iteration.judgements})
    made = output.table("iter", "decision", *figures, *judges, right=("iter", *figures, *judges))
    for iteration in view.iterations:
        if (record := iteration.record) is None:
            continue
        said = {one.judge: verdict_figure(one.verdict) for one in iteration.judgements}
        made.add_row(
            str(record.iteration), output.state(record.decision), *iteration_figures(record),
            *(said.get(judge, "-") for judge in judges),
        )  # fmt: skip
    return made


def verdict_figure(verdict: Verdict) -> str:
    """`63 % vs ref`: how often a judge prefers the iteration's policy."""
    return f"{output.percent(verdict.win_rate)} vs {'ref' if verdict.against == 'reference' else 'inc'}"


def iteration_figures(record: IterationRecord) -> list[str]:
    """The figures of `iterations_table`."""
    m = record.metrics
    error = record.test.standard_error if record.test else None
    return [
        output.number(m.proxy_reward), output.number(error), output.percent(m.win_rate_vs_reference),
        output.percent(m.win_rate_vs_incumbent), output.number(m.kl, 2), output.number(m.response_tokens, 0),
        str(m.pairs) if m.pairs is not None else "-", output.number(m.dpo_loss), output.percent(m.dpo_accuracy),
        output.seconds(sum(record.seconds_by_stage.values())) if record.seconds_by_stage else "-",
    ]  # fmt: skip


def live_view(view: RunView, remark: str = "") -> Group:
    """What `ratchet watch` shows on a terminal."""
    parts: list[Text | Table] = [headline(view)]
    if remark:
        parts.append(Text(remark, style="yellow"))
    iteration = current_iteration(view)
    if iteration is not None and iteration.record is None:
        parts += [Text(), Text(f"iteration {iteration.iteration}", style="bold"), stages_table(iteration)]
    if table := iterations_table(view):
        parts += [Text(), table]
    return Group(*parts)


def decision_lines(record: IterationRecord) -> list[str]:
    """The decision of one iteration with its reasons, and time per stage."""
    lines = [f"iteration {record.iteration}: {record.decision}, serving {record.serving}"]
    lines += [f"  {reason}" for reason in record.reasons]
    if record.metrics.dropped:
        lines.append(
            "  dropped: " + ", ".join(f"{reason} {count}" for reason, count in sorted(record.metrics.dropped.items()))
        )
    if record.seconds_by_stage:
        lines.append(
            "  time: " + ", ".join(f"{name} {output.seconds(s)}" for name, s in record.seconds_by_stage.items())
        )
    return lines
