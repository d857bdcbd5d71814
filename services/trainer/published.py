"""Whether a job's checkpoint is published already, and by the same job."""

from __future__ import annotations

from services.contracts.errors import Conflict, NotFound
from services.contracts.layout import manifest_file
from services.contracts.training import TrainingJob, TrainingResult
from services.platform.store import ArtifactStore
from services.trainer.workspace import canonical

RESULT_NAME = "training_result.json"
JOB_NAME = "training_job.json"
"""Kept in the checkpoint: what was asked and what came of it, so that a wiped queue loses neither."""


def published_result(store: ArtifactStore, job_id: str, job: TrainingJob) -> TrainingResult | None:
    """The recorded result when the output is there; None when it is still to be made.

    Raises:
        Conflict: another job (other data, start or settings) published the output. What is published never changes.
    """
    if not store.exists(manifest_file(job.output)):
        return None
    manifest = store.manifest(job.output)
    if manifest.lineage.job_id != job_id and _asked(store, job) != canonical(job):
        raise Conflict(
            f"{job.output} was published by the job {manifest.lineage.job_id!r}, which asked for something else; what "
            "is published never changes, so choose another output",
            field="output",
        )
    try:
        return store.read_model(f"{job.output}/{RESULT_NAME}", TrainingResult)
    except NotFound:
        return TrainingResult(checkpoint=job.output, version=manifest.version, metrics=manifest.metrics, seconds=0.0)


def _asked(store: ArtifactStore, job: TrainingJob) -> str | None:
    try:
        return store.read_bytes(f"{job.output}/{JOB_NAME}").decode().strip()
    except NotFound:
        return None
