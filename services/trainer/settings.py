"""Settings of the trainer. Variables are prefixed `RATCHET_TRAINER_`."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field, ValidationInfo, field_validator

from services.contracts.device import LEASE_RENEWALS
from services.platform.settings import ServiceSettings

END_SLACK_SECONDS = 2.0
"""Kept free between SIGKILL to a training process and the end of a lease that could not be renewed: its memory is to be
free, and the generator's clock of it began a network's delay apart."""


class TrainerSettings(ServiceSettings):
    """What the operator of a trainer can set, beyond what every service has."""

    trainer_allow_hub: bool = Field(default=False, description="May `import_model` download from the Hugging Face hub?")
    trainer_spare_child: bool = Field(
        default=True,
        description="Keep a process ready that has imported torch and TRL (about 400 MB); it hides 10-20 s per job.",
    )
    trainer_threads: int = Field(
        default_factory=lambda: len(os.sched_getaffinity(0)),
        ge=1,
        description="CPU threads of the training process (OMP_NUM_THREADS); default: the process's cores.",
    )
    trainer_start_seconds: float = Field(
        default=180.0,
        gt=0,
        description="A child that has not finished its imports by then is ended. A cold disk needs up to a minute.",
    )
    trainer_stall_seconds: float = Field(
        default=1800.0,
        gt=0,
        description="A child that reports nothing for so long is ended, and its job tried again. Loading and saving a "
        "large model are the longest silences.",
    )
    trainer_term_seconds: float = Field(
        default=3.0,
        gt=0,
        description="From SIGTERM to SIGKILL when a job is cancelled. Below the worker's "
        "cancel_grace_seconds (5). Nothing is lost: a retry resumes from the last save.",
    )
    trainer_lock_seconds: float = Field(
        default=30.0,
        gt=0,
        description="How long an attempt waits for an earlier, dying one at the same job to let go of its work folder.",
    )
    trainer_generator_url: str | None = Field(
        default=None,
        description="Generator whose device this trainer shares: each job that trains leases it first, and vLLM sleeps "
        "until the training process has ended. The generator needs RATCHET_GENERATOR_SLEEP=true. Unset: a device each.",
    )
    trainer_lease_seconds: float = Field(
        default=60.0,
        gt=0,
        le=3600,
        description="Length of the lease, renewed at each third; at least 3 * (RATCHET_TRAINER_TERM_SECONDS + 2). A "
        "killed trainer blocks the generator for so long; a generator out of reach for so long costs the attempt, "
        "which goes on from its last save.",
    )
    trainer_lease_wait_seconds: float = Field(
        default=1800.0,
        gt=0,
        description="How long an attempt waits for the device: for a turn of another trainer, running rollouts, a "
        "generator that starts. Then it fails and is tried again.",
    )
    trainer_work_folder: Path | None = Field(
        default=None,
        description="Local disk for resumable state when the store is remote; default: the system's temporary folder. "
        "A local store has it on its own disk.",
    )
    trainer_log_folder: Path | None = Field(
        default=None,
        description="Where trackers named in `report_to` write: TensorBoard one folder per job id under tensorboard/, "
        "the others their local files. Default: logs/ in a local store, else in the work folder.",
    )
    trainer_tracker_project: str = Field(
        default="ratchet",
        min_length=1,
        description="Project or experiment of the trackers, unless WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME or "
        "TRACKIO_PROJECT says otherwise. The run is named by the job's id.",
    )
    trainer_tracker_end_seconds: float = Field(
        default=30.0,
        gt=0,
        description="After a training its trackers get it to send what they still hold; then they are given up.",
    )
    trainer_work_keep_days: float = Field(
        default=7.0,
        gt=0,
        description="Resumable state of jobs that failed or were cancelled is removed after this many days.",
    )

    @field_validator("trainer_generator_url")
    @classmethod
    def _http(cls, value: str | None) -> str | None:
        if not value:  # compose passes an unset variable on as an empty one
            return None
        if not value.startswith(("http://", "https://")):
            raise ValueError(f"{value!r} is no URL; write it like http://generator:8001, or unset it")
        return value

    @field_validator("trainer_lease_seconds")
    @classmethod
    def _process_ends_within(cls, value: float, info: ValidationInfo) -> float:
        ending = float(info.data.get("trainer_term_seconds", 0.0))
        least = LEASE_RENEWALS * (ending + END_SLACK_SECONDS)
        if value < least:
            raise ValueError(
                f"{value:g} s is too short: a training process may take RATCHET_TRAINER_TERM_SECONDS ({ending:g} s) to "
                f"end and {END_SLACK_SECONDS:g} s to free its memory, which must fit in a third of a lease; allow "
                f"{least:g} s or more"
            )
        return value

    @property
    def trainer_lease_margin_seconds(self) -> float:
        """So long before a lease ends unrenewed, the training process is told to end."""
        return self.trainer_term_seconds + END_SLACK_SECONDS
