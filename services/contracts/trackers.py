"""Trackers that training curves can go to besides the event stream: what the trainer has, and how it gets others."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pydantic import Field

from services.contracts.errors import InvalidInput
from services.contracts.model import Contract
from services.contracts.training import Tracker

PACKAGES: dict[Tracker, str] = {
    "tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny", "trackio": "trackio",
}  # fmt: skip
"""Distribution of each tracker. The names they are imported by are the trackers' own."""


class InstalledTrackers(Contract):
    """Answer of the trainer's `GET /v1/trackers`."""

    trackers: tuple[Tracker, ...] = Field(description="What `report_to` may name there: these are installed.")


def check_trackers(names: Sequence[Tracker], installed: Collection[Tracker], field: str) -> None:
    """Refuse trackers that the trainer does not have.

    Args:
        field: Dotted name of the `report_to` that names them, as its sender knows it.

    Raises:
        InvalidInput: naming them and how the trainer gets them.
    """
    missing: list[Tracker] = [name for name in names if name not in installed]
    if missing:
        packages = " ".join(PACKAGES[name] for name in missing)
        all_packages = " ".join(PACKAGES[name] for name in PACKAGES if name in installed or name in missing)
        have = ", ".join(name for name in PACKAGES if name in installed) or "none"
        raise InvalidInput(
            f"{field} names {', '.join(missing)}, which the trainer does not have (it has: {have}): pip install "
            f"{packages} in its environment (the extra 'trackers' has all), or build its container with "
            f'RATCHET_TRACKERS="{all_packages}", or take it out of report_to',
            field=field,
        )
