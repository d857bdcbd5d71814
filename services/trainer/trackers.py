"""Trackers that training curves can go to besides the event stream: which are there, and how each is set up.

Each tracker has environment variables of its own, and what the operator sets counts; here are only the defaults that
keep a training's run in one place, under the job's id. No library is imported.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from services.contracts.model import Contract
from services.contracts.trackers import PACKAGES, check_trackers
from services.contracts.training import Tracker
from services.platform.store import ArtifactStore


class Tracking(Contract):
    """Where a job's curves go, for the training process."""

    folder: str
    """Local folder of what trackers write themselves."""
    project: str
    """Project (wandb, trackio) or experiment (MLflow)."""
    end_seconds: float
    """Trackers get it after the training to send what they still hold."""


def installed() -> tuple[Tracker, ...]:
    """Trackers that are installed here, where the training process runs."""
    return tuple(name for name in PACKAGES if find_spec(name) is not None)


def check_installed(names: Sequence[Tracker]) -> None:
    """Refuse trackers that are not installed here.

    Raises:
        InvalidInput: naming them and how to install them.
    """
    check_trackers(names, installed(), "config.report_to")


def default_folder(store: ArtifactStore, configured: Path | None, work_folder: Path | None) -> Path:
    """Where trackers write: as configured, else `logs/` in a local store, else in the work folder.

    Never the folder of a job's work, which goes when the job is done.
    """
    if configured is not None:
        return configured
    if store.is_local:
        return store.work_folder("train").parents[1] / "logs"
    return store.work_folder("logs", work_folder)


def environment(
    names: Sequence[Tracker], tracking: Tracking, job_id: str, given: Mapping[str, str], mlflow_run: str | None = None
) -> dict[str, str]:
    """Variables to set before the trackers are imported.

    Args:
        given: The environment as it is; what it says of projects, folders and addresses is kept.
        mlflow_run: The run that an earlier attempt at the job opened.
    """
    folder = Path(tracking.folder)
    wanted: dict[str, str] = {}
    defaults: dict[str, str] = {}
    if "tensorboard" in names:
        base = Path(given.get("TENSORBOARD_LOGGING_DIR") or folder / "tensorboard")
        wanted["TENSORBOARD_LOGGING_DIR"] = str(base / job_id)
    if "wandb" in names:
        # An id of our own and `allow`: the next attempt at the job goes on with the same run.
        wanted |= {"WANDB_RUN_ID": run_id(job_id), "WANDB_RESUME": "allow"}
        defaults |= {"WANDB_PROJECT": tracking.project, "WANDB_DIR": str(folder)}
    if "mlflow" in names:
        defaults |= {
            "MLFLOW_TRACKING_URI": (folder / "mlruns").as_uri(), "MLFLOW_EXPERIMENT_NAME": tracking.project,
            # Its own 7 retries of 120 s would outlast most trainings.
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        }  # fmt: skip
        if given.get("MLFLOW_TRACKING_URI", "file:").startswith("file:"):
            # MLflow 3.17 refuses its file store unless told; a file: address tells.
            defaults["MLFLOW_ALLOW_FILE_STORE"] = "true"
        if mlflow_run is not None:
            wanted["MLFLOW_RUN_ID"] = mlflow_run
    if "trackio" in names:
        defaults["TRACKIO_DIR"] = str(folder / "trackio")
    return {key: value for key, value in defaults.items() if not given.get(key)} | wanted


def run_id(job_id: str) -> str:
    """A job's id as wandb takes it: no slash, and still one for each job."""
    digest = hashlib.sha256(job_id.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', job_id)[:80]}-{digest}"


def project_of(name: Tracker, tracking: Tracking) -> str:
    """Project of a tracker that takes it as an argument instead of a variable."""
    return os.environ.get("TRACKIO_PROJECT") or tracking.project if name == "trackio" else tracking.project
