"""Options of the charts, as ECharts takes them, in one style. Pure.

Colours are of middle lightness, so that a chart reads on light and dark alike and is not drawn anew when that changes;
tooltips are HTML and take the page's own colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BLUE, TEAL, AMBER, VIOLET, ROSE, SLATE, GREEN = (
    "#4c8df6", "#16a394", "#d99a20", "#9a78f0", "#e4607a", "#8592a6", "#3fa95c",
)  # fmt: skip
STAGE_COLOURS = ("#5b7fd1", "#4c8df6", "#48a9c5", "#16a394", "#d99a20", "#e07b4f", "#9a78f0", "#c77dd6", "#8592a6")
AXIS = "#8592a6"
GRID = "rgba(133, 146, 166, 0.22)"
CROSS = "path://M2,0 L5,3 L8,0 L10,2 L7,5 L10,8 L8,10 L5,7 L2,10 L0,8 L3,5 L0,2 Z"
"""A rejected iteration; a promoted one is a disc, the baseline a diamond: told apart without colour."""
SYMBOLS = {"promoted": "circle", "rejected": CROSS, "baseline": "diamond"}
CROWDED = 30
"""More points than this are drawn with smaller marks."""

Values = Sequence[float | None]


@dataclass(frozen=True)
class Line:
    """One line of a chart: a value per category, None where there is none.

    Attributes:
        marks: Decision at each category, drawn as a symbol; without them points have no mark.
        right: On the right axis.
    """

    name: str
    values: Values
    colour: str
    marks: Sequence[str | None] | None = None
    dashed: bool = False
    right: bool = False
    digits: int = 3


@dataclass(frozen=True)
class Band:
    """A shaded range around a line: an interval, or worst to best."""

    name: str
    low: Values
    high: Values
    colour: str


def line_chart(
    categories: Sequence[str], lines: Sequence[Line], *, bands: Sequence[Band] = (), share: bool = False,
    label: str, axis: str = "iteration", zero: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Lines over categories.

    Args:
        share: Values are between 0 and 1 and shown in per cent.
        label: What a screen reader says.
        zero: The value axis includes 0.
    """
    series: list[dict[str, Any]] = []
    for band in bands:
        series += _band(band)
    series += [_line(line, len(categories)) for line in lines]
    right = any(line.right for line in lines)
    options = _frame(categories, label, axis)
    options["yAxis"] = [_value_axis(share=share, zero=zero)]
    if right:
        options["yAxis"].append(_value_axis(share=False, zero=False) | {"splitLine": {"show": False}})
        options["grid"]["right"] = 8
    options["series"] = series
    return options


def bar_chart(
    categories: Sequence[str], bars: Sequence[Line], *, label: str, axis: str = "iteration"
) -> dict[str, Any]:
    """Stacked bars over categories."""
    options = _frame(categories, label, axis)
    options["xAxis"]["boundaryGap"] = True
    options["tooltip"]["axisPointer"] = {"type": "shadow", "shadowStyle": {"color": GRID}}
    options["yAxis"] = [_value_axis(share=False, zero=True)]
    options["series"] = [
        {
            "type": "bar", "stack": "all", "name": bar.name, "data": list(bar.values), "barMaxWidth": 26,
            "itemStyle": {"color": bar.colour}, "emphasis": {"focus": "series"},
        }
        for bar in bars
    ]  # fmt: skip
    return options


def _frame(categories: Sequence[str], label: str, axis: str) -> dict[str, Any]:
    return {
        "animation": False,
        "aria": {"enabled": True, "label": {"description": label}},
        "textStyle": {"fontFamily": "inherit"},
        "grid": {"left": 4, "right": 14, "top": 12, "bottom": 4, "containLabel": True},
        "tooltip": {
            "trigger": "axis", "confine": True, "backgroundColor": "var(--raised)", "borderColor": "var(--line)",
            "padding": [6, 10], "textStyle": {"color": "var(--ink)", "fontSize": 12},
            "axisPointer": {"type": "line", "lineStyle": {"color": AXIS, "type": "dashed"}},
            ":formatter": f"(points) => window.ratchetTooltip({axis!r}, points)",
        },
        "xAxis": {
            "type": "category", "data": list(categories), "boundaryGap": len(categories) < 2,
            "axisLine": {"lineStyle": {"color": GRID}}, "axisTick": {"show": False},
            "axisLabel": {"color": AXIS, "fontSize": 11, "hideOverlap": True},
        },
    }  # fmt: skip


def _value_axis(*, share: bool, zero: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"color": AXIS, "fontSize": 11, "hideOverlap": True}
    shown[":formatter"] = "(v) => window.ratchetShare(v)" if share else "(v) => window.ratchetNumber(v)"
    return {
        "type": "value", "scale": not zero, "splitNumber": 4, "axisLabel": shown,
        "splitLine": {"lineStyle": {"color": GRID}},
    }  # fmt: skip


def _line(line: Line, categories: int) -> dict[str, Any]:
    marks = line.marks or ()
    size = 5 if categories > CROWDED else 8
    data: list[Any] = list(line.values)
    for place, decision in enumerate(marks):
        if decision is not None and line.values[place] is not None:
            item: dict[str, Any] = {
                "value": line.values[place],
                "symbol": SYMBOLS[decision],
                "symbolSize": size,
                "decision": decision,
            }
            if decision == "rejected":
                item |= {"itemStyle": {"color": ROSE}, "symbolSize": size + 1}
            data[place] = item
    present = sum(1 for value in line.values if value is not None)
    return {
        "type": "line", "name": line.name, "data": data, "yAxisIndex": 1 if line.right else 0,
        "showSymbol": bool(marks) or present < 2, "symbol": "circle", "symbolSize": 5, "connectNulls": True,
        "lineStyle": {"width": 1.8, "type": "dashed" if line.dashed else "solid", "color": line.colour},
        "itemStyle": {"color": line.colour}, "emphasis": {"disabled": True},
    }  # fmt: skip


def _band(band: Band) -> list[dict[str, Any]]:
    """A band is a stack of two lines without strokes: its lower end, and its width, which is filled."""
    width = [None if low is None or high is None else high - low for low, high in zip(band.low, band.high, strict=True)]
    low = [value if wide is not None else None for value, wide in zip(band.low, width, strict=True)]
    common: dict[str, Any] = {
        "type": "line", "stack": band.name, "stackStrategy": "all", "symbol": "none", "silent": True,
        "lineStyle": {"opacity": 0}, "emphasis": {"disabled": True}, "tooltip": {"show": False},
    }  # fmt: skip
    return [
        common | {"name": f"{band.name} low", "data": low},
        common
        | {
            "name": f"{band.name} high", "data": width, "itemStyle": {"color": band.colour},
            "areaStyle": {"color": band.colour, "opacity": 0.16},
        },
    ]  # fmt: skip
