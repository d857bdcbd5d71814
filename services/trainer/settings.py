"""Settings of the trainer. Variables are prefixed `RATCHET_TRAINER_`."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field

from services.platform.settings import ServiceSettings


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
    trainer_work_folder: Path | None = Field(
        default=None,
        description="Local disk for resumable state when the store is remote; default: the system's temporary folder. "
        "A local store has it on its own disk.",
    )
    trainer_work_keep_days: float = Field(
        default=7.0,
        gt=0,
        description="Resumable state of jobs that failed or were cancelled is removed after this many days.",
    )
