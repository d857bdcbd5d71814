"""Figures as people read them. Pure."""

from __future__ import annotations

from datetime import UTC, datetime

NONE = "\N{EN DASH}"
"""Shown where there is no figure."""
MINUS = "\N{MINUS SIGN}"
MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0


def number(value: float | None, digits: int = 3) -> str:
    """`1.235`; a value that is small against its digits gets two significant ones: `0.00012`."""
    if value is None:
        return NONE
    if value != 0.0 and abs(value) < 10.0**-digits:
        return f"{value:.2g}"
    return f"{value:,.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """`+0.412` or `−0.020`, with a real minus sign."""
    if value is None:
        return NONE
    shown = number(abs(value), digits)
    return f"{'+' if value >= 0 else MINUS}{shown}"


def count(value: float | None) -> str:
    """`20,000`."""
    return NONE if value is None else f"{value:,.0f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as `61.2 %`."""
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def p_value(value: float | None) -> str:
    """`0.031`, and `< 0.001` below that."""
    if value is None:
        return NONE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def duration(seconds: float | None) -> str:
    """`0.8 s`, `42 s`, `3 m 05 s`, `2 h 10 m`, `3 d 4 h`."""
    if seconds is None:
        return NONE
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < MINUTE - 0.5:
        return f"{seconds:.0f} s"
    if seconds < HOUR:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} m {rest:02d} s"
    if seconds < DAY:
        hours, rest = divmod(round(seconds / MINUTE), 60)
        return f"{hours} h {rest:02d} m"
    days, rest = divmod(round(seconds / HOUR), 24)
    return f"{days} d {rest} h"


def milliseconds(seconds: float | None) -> str:
    """A latency: `12 ms`."""
    return NONE if seconds is None else f"{1000 * seconds:.0f} ms"


def ago(moment: str, now: datetime | None = None) -> str:
    """An ISO 8601 moment, seen from now: `just now`, `5 min ago`, `3 h ago`, `2 days ago`, then its date."""
    then = datetime.fromisoformat(moment)
    seconds = ((now or datetime.now(UTC)) - then).total_seconds()
    if seconds < MINUTE:
        return "just now"
    if seconds < HOUR:
        return f"{seconds / MINUTE:.0f} min ago"
    if seconds < DAY:
        return f"{seconds / HOUR:.0f} h ago"
    if seconds < 14 * DAY:
        days = round(seconds / DAY)
        return f"{days} day{'s' if days > 1 else ''} ago"
    return then.date().isoformat()


def moment(iso: str) -> str:
    """An ISO 8601 moment to the second, UTC."""
    return datetime.fromisoformat(iso).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def short(text: str, characters: int) -> str:
    """One line of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= characters else line[: characters - 1].rstrip() + "…"
