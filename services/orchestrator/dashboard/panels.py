"""The parts of a page that are read and not operated, as HTML: templates filled from views. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from services.contracts.browsing import JudgedResponse, PairDetail
from services.contracts.health import ServiceHealth
from services.contracts.problems import Problem
from services.contracts.recipes import Recipe
from services.contracts.runs import IterationView, RunStatus, RunView, StageView
from services.orchestrator.dashboard import figures
from services.orchestrator.dashboard.curves import Curve

STATUS_ICONS = {
    RunStatus.QUEUED: "schedule",
    RunStatus.RUNNING: "play_circle",
    RunStatus.PAUSED: "pause_circle",
    RunStatus.IDLE: "check_circle",
    RunStatus.FAILED: "error",
    RunStatus.CANCELLED: "block",
}
DECISION_ICONS = {"baseline": "flag", "promoted": "arrow_circle_up", "rejected": "cancel"}
HEALTH_ICONS = {"ready": "check_circle", "not_ready": "pending", "unreachable": "error"}
STAGE_NAMES = {
    "import": "Import models", "prompts": "Draw prompts", "sample": "Sample", "score": "Score", "pair": "Pair",
    "train": "Train", "load": "Load candidate", "evaluate": "Evaluate", "evaluate-score": "Score evaluation",
    "decide": "Decide",
}  # fmt: skip

_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


@dataclass(frozen=True)
class Tile:
    """One figure at the top of a run, and what it is compared with."""

    name: str
    value: str
    note: str
    trend: str = ""


def status_line(view: RunView) -> str:
    """Status, progress and incumbent of a run in one line."""
    return _render("status.html", view=view, current=current(view), stage=active_stage(view))


def tiles(view: RunView) -> str:
    """The latest figures against the baseline's."""
    return _render("tiles.html", tiles=run_tiles(view))


def stage_table(iteration: IterationView | None) -> str:
    """The stages of an iteration with their progress."""
    return _render("stages.html", iteration=iteration)


def trouble(view: RunView) -> str:
    """The problem of a failed run in full, its warnings and skipped lines; empty when there are none."""
    return _render("trouble.html", view=view).strip()


def decisions(view: RunView) -> str:
    """What the gate decided, newest first, with its reasons and the figures of its test."""
    decided = [one for one in reversed(view.iterations) if one.record is not None]
    return _render("decisions.html", run=view.id, decided=decided)


def recipe(view: RunView) -> str:
    """Every value of the recipe, by table."""
    return _render("recipe.html", groups=tuple(recipe_groups(view.recipe)))


def key(curve: Curve) -> str:
    """Title, key and latest figures of a chart."""
    return _render("key.html", curve=curve)


def pair(detail: PairDetail) -> str:
    """A pair among all responses it was chosen from."""
    return _render("pair.html", detail=detail, responses=ranked(detail.responses), scale=RewardScale.of(detail))


def services(health: Sequence[ServiceHealth]) -> str:
    """How each service is."""
    return _render("services.html", health=health)


def indicator(health: Sequence[ServiceHealth]) -> str:
    """All services in a corner."""
    serving = next((one.serving[0] for one in health if one.name == "generator" and one.serving), None)
    return _render(
        "indicator.html", health=health, serving=serving, bad=[one for one in health if one.state != "ready"]
    )


def problem(found: Problem) -> str:
    """An error in place of what was asked for."""
    return _render("problem.html", problem=found)


def current(view: RunView) -> IterationView | None:
    """The iteration to show the stages of: the one under way, else the latest."""
    return view.iterations[-1] if view.iterations else None


def active_stage(view: RunView) -> StageView | None:
    """The latest stage that is at work; stages overlap."""
    shown = current(view)
    if shown is None or shown.record is not None:
        return None
    begun = [stage for stage in shown.stages if stage.state in ("running", "failed")]
    return begun[-1] if begun else None


def progress(stage: StageView) -> float:
    """Share of a stage that is done, between 0 and 1: by its items where it counts them, else by its jobs."""
    if stage.state == "succeeded":
        return 1.0
    if stage.items_total:
        return min(1.0, stage.items_done / stage.items_total)
    return stage.done / stage.total if stage.total else 0.0


def run_tiles(view: RunView) -> tuple[Tile, ...]:
    """Figures of the latest decided iteration, compared with the baseline's; those that are not measured are absent."""
    decided = [one for one in view.iterations if one.record is not None]
    records = [one.record for one in decided if one.record is not None]
    if not records:
        return ()
    first, last = records[0].metrics, records[-1].metrics
    more = len(records) > 1
    # After a rejection these are not the figures of what is served.
    whose = f" (iteration {records[-1].iteration}, rejected)" if records[-1].decision == "rejected" else ""
    made: list[Tile] = [
        Tile(
            f"Held-out reward{whose}",
            figures.number(last.proxy_reward),
            *_against(first.proxy_reward, last.proxy_reward, more),
        )
    ]
    judged = next((one for one in reversed(decided) if one.judgements), None)
    if judged is not None:
        verdict = judged.judgements[0].verdict
        interval = (
            f"{100 * verdict.low:.0f} {figures.NONE} {100 * verdict.high:.0f} %, "
            if verdict.low is not None and verdict.high is not None
            else ""
        )
        made.append(
            Tile(f"Judge {judged.judgements[0].judge}", figures.percent(verdict.win_rate),
                 f"{interval}vs {verdict.against}"
                 + (f", iteration {judged.iteration}" if judged is not decided[-1] else ""))
        )  # fmt: skip
    if more:
        made.append(Tile("Win rate by reward", figures.percent(last.win_rate_vs_reference), "vs the reference"))
    made.append(Tile("KL", figures.number(last.kl), "nats per response"))
    made.append(
        Tile(
            "Length",
            figures.number(last.response_tokens, 1),
            *_against(first.response_tokens, last.response_tokens, more, 1),
        )
    )
    if last.pairs is not None:
        made.append(Tile("Pairs", figures.count(last.pairs), f"of {figures.count(last.prompts)} prompts"))
    promoted = sum(1 for record in records if record.decision == "promoted")
    made.append(Tile("Promoted", f"{promoted} of {len(records) - 1}", f"incumbent {view.incumbent or figures.NONE}"))
    return tuple(made)


def _against(first: float | None, last: float | None, more: bool, digits: int = 3) -> tuple[str, str]:
    if not more or first is None or last is None:
        return "baseline", ""
    return (
        f"{figures.signed(last - first, digits)} vs baseline",
        "up" if last > first else "down" if last < first else "",
    )


Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]


def recipe_groups(recipe: Recipe) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Tables of the recipe with their values as text; the values of the top level come first."""
    values: dict[str, Json] = recipe.model_dump(mode="json")
    yield "run", [(name, _text(value)) for name, value in values.items() if not isinstance(value, dict)]
    for name, value in values.items():
        if isinstance(value, dict):
            yield name, list(_flat(value))


def _flat(values: dict[str, Json], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
            continue
        tables = [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
        for place, one in enumerate(tables):
            yield f"{prefix}{name}.{place}", ", ".join(f"{key} {_text(found)}" for key, found in one.items())
        if not tables:
            yield f"{prefix}{name}", _text(value)


def _text(value: Json) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(_text(one) for one in value) or "none"
    return str(value)


def ranked(responses: Sequence[JudgedResponse]) -> list[JudgedResponse]:
    """Chosen, rejected, then the others by reward; those without a reward last."""
    order = {"chosen": 0, "rejected": 1, None: 2}
    return sorted(responses, key=lambda one: (order[one.role], one.reward is None, -(one.reward or 0.0), one.index))


@dataclass(frozen=True)
class RewardScale:
    """Where a reward lies between a prompt's worst and best."""

    worst: float
    best: float

    @staticmethod
    def of(detail: PairDetail) -> RewardScale:
        """The scale of one prompt."""
        rewards = [one.reward for one in detail.responses if one.reward is not None]
        return RewardScale(min(rewards, default=0.0), max(rewards, default=0.0))

    def place(self, reward: float | None) -> int:
        """Per cent of the way from worst to best."""
        if reward is None or self.best <= self.worst:
            return 0
        return round(100 * (reward - self.worst) / (self.best - self.worst))


FILTERS: dict[str, Callable[..., str | float]] = {
    "number": figures.number, "signed": figures.signed, "count": figures.count, "percent": figures.percent,
    "p_value": figures.p_value, "duration": figures.duration, "milliseconds": figures.milliseconds,
    "ago": figures.ago, "moment": figures.moment, "progress": progress,
}  # fmt: skip
NAMES: dict[str, Mapping[Any, str]] = {
    "status_icons": STATUS_ICONS, "decision_icons": DECISION_ICONS, "health_icons": HEALTH_ICONS,
    "stage_names": STAGE_NAMES,
}  # fmt: skip
_templates.filters.update(FILTERS)  # pyright: ignore[reportUnknownMemberType]
_templates.globals.update(NAMES)  # pyright: ignore[reportUnknownMemberType]


def _render(template: str, **values: Any) -> str:
    return _templates.get_template(template).render(**values)
