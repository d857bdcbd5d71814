"""The frame around each kind of training: sources checked before anything is loaded, the checkpoint published after."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from services.contracts.checkpoints import CheckpointKind, Lineage, LogprobProbe, Manifest, ScoreProbe
from services.contracts.errors import CheckpointRefused, InvalidInput
from services.contracts.layout import version_of
from services.contracts.training import Tracker, TrainingJob, TrainingProgress, TrainingResult
from services.platform.checkpoints import verify_checkpoint
from services.platform.store import ArtifactStore
from services.trainer.checkpoints import copy_description, load_model, save_weights, write_manifest
from services.trainer.probes import logprob_probes
from services.trainer.progress import Report
from services.trainer.published import RESULT_NAME
from services.trainer.trackers import Tracking
from services.trainer.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from services.trainer.loop import Outcome


@dataclass(frozen=True)
class Task:
    """One job at work in its child process."""

    job_id: str
    store: ArtifactStore
    workspace: Workspace
    report: Report
    started: float
    allow_hub: bool = False
    tracking: Tracking | None = None
    tracker_failed: Callable[[Tracker, str], None] = lambda tracker, detail: None

    def phase(self, phase: str, step: int = 0, total: int = 0) -> None:
        """Report a phase other than training."""
        self.report(TrainingProgress.model_validate({"phase": phase, "step": step, "total_steps": total}))

    def open_checkpoint(self, folder: str, kind: CheckpointKind, field: str) -> tuple[Manifest, Path]:
        """A checkpoint, verified file by file. Raises CheckpointRefused naming `field`."""
        try:
            manifest = verify_checkpoint(self.store, folder, kind)
        except CheckpointRefused as error:
            raise CheckpointRefused(error.detail, field=field) from error
        return manifest, self.store.local_folder(folder)

    def fresh_output(self) -> Path:
        """An empty folder for the checkpoint; what a killed attempt left in it is gone."""
        shutil.rmtree(self.workspace.output, ignore_errors=True)
        self.workspace.output.mkdir(parents=True)
        return self.workspace.output


@dataclass(frozen=True)
class SavedPolicy:
    """A trained policy as its saved weights are, read back."""

    model: PreTrainedModel
    probes: tuple[LogprobProbe, ...]
    shift: float
    """How far training moved the most telling probe, nats."""


def save_policy(
    task: Task,
    model: PreTrainedModel,
    start: Path,
    manifest: Manifest,
    windows: Sequence[tuple[int, ...]],
    before: Sequence[Sequence[float]],
) -> SavedPolicy:
    """Save a trained policy beside its start's tokenizer and config, and probe what was saved.

    Args:
        start: Folder of the checkpoint it was trained from; `manifest` is that one's, whose dtype is kept.
        windows: Token sequences to probe.
        before: Their log-probs under the start, per window and token.

    Raises:
        JobFailed: the saved weights give log-probs that are not finite.
    """
    task.phase("saving")
    folder = task.fresh_output()
    save_weights(model, folder, manifest.dtype)
    copy_description(start, folder)
    saved = load_model(folder, "policy")
    probes, shift = logprob_probes(saved, windows, before)
    return SavedPolicy(saved, probes, shift)


@dataclass(frozen=True)
class Finished:
    """What a training hands over for publishing: the folder is complete but for result, job and manifest."""

    kind: CheckpointKind
    model: PreTrainedModel
    metrics: Mapping[str, float]
    lineage: Lineage
    logprob_probes: tuple[LogprobProbe, ...] = ()
    score_probes: tuple[ScoreProbe, ...] = ()
    outcome: Outcome | None = None


def publish(task: Task, job: TrainingJob, finished: Finished) -> TrainingResult:
    """Write the manifest and publish the folder; when another attempt was first, its result is the result."""
    outcome = finished.outcome
    result = TrainingResult(
        checkpoint=job.output,
        version=version_of(job.output),
        metrics={**(outcome.metrics if outcome else {}), **finished.metrics},
        curve=outcome.curve if outcome else (),
        seconds=round(time.monotonic() - task.started, 3),
        resumed_from_step=outcome.resumed_from_step if outcome else None,
    )
    write_manifest(
        task.workspace.output,
        kind=finished.kind,
        model=finished.model,
        result=result,
        job=job,
        lineage=finished.lineage,
        logprob_probes=finished.logprob_probes,
        score_probes=finished.score_probes,
    )
    if task.store.publish_folder(task.workspace.output, job.output):
        return result
    return task.store.read_model(f"{job.output}/{RESULT_NAME}", TrainingResult)


def drop_too_long(lengths: list[int], max_length: int, what: str) -> tuple[list[int], int]:
    """Indices of the examples that fit, and how many do not. Nothing is ever cut.

    Raises:
        InvalidInput: none fits.
    """
    kept = [index for index, length in enumerate(lengths) if length <= max_length]
    if not kept:
        raise InvalidInput(
            f"config.max_length {max_length} is too short for every one of the {len(lengths)} {what}: the shortest has "
            f"{min(lengths)} tokens, the longest {max(lengths)}. Raise max_length",
            field="config.max_length",
        )
    return kept, len(lengths) - len(kept)
