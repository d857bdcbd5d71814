"""The time, as it is written into records."""

from __future__ import annotations

from datetime import UTC, datetime


def now_iso() -> str:
    """UTC, ISO 8601, to the microsecond: runs are ordered by it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
