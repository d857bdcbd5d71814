"""Resumable state: only whole trainer checkpoints are resumed from, one attempt at a time; published work is found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.contracts.errors import Conflict, Unavailable
from services.contracts.training import SftJob
from services.platform.store import ArtifactStore
from services.trainer.jobs import request_for
from services.trainer.published import published_result
from services.trainer.workspace import (
    COMPLETE_NAME,
    Workspace,
    canonical,
    mark_complete,
    remove_old,
    resumable_checkpoint,
    workspace_name,
)
from tests.fixtures.models import write_manifest

CONFIG = {"learning_rate": 1e-3, "train_batch_size": 8, "max_length": 64}


def job(**changes: object) -> SftJob:
    return SftJob.model_validate(
        {"start": "models/a", "data": "d.jsonl", "config": CONFIG, "output": "models/b"} | changes
    )


def checkpoint(trainer: Path, step: int, *, whole: bool = True) -> Path:
    folder = trainer / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
        (folder / name).write_text(f"{name} {step}")
    if whole:
        mark_complete(folder)
    return folder


def test_the_newest_whole_checkpoint_is_resumed_from_and_by_number(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        checkpoint(tmp_path, step)
    assert resumable_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_a_checkpoint_cut_short_is_never_resumed_from(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5)
    checkpoint(tmp_path, 10, whole=False)
    shorter = checkpoint(tmp_path, 15)
    (shorter / "optimizer.pt").write_text("op")
    lost = checkpoint(tmp_path, 20)
    (lost / "trainer_state.json").unlink()
    torn = checkpoint(tmp_path, 25)
    (torn / COMPLETE_NAME).write_text('{"model.saf')
    assert resumable_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-5"]


def test_without_a_checkpoint_training_starts_afresh(tmp_path: Path) -> None:
    assert resumable_checkpoint(tmp_path / "absent") is None


def test_a_second_attempt_waits_for_the_first_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from services.trainer.workspace import Workspace\n"
        f"with Workspace(pathlib.Path({str(tmp_path)!r})).locked(0): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(Unavailable, match=f"pid {holder.pid}"), Workspace(tmp_path).locked(0.2):
                pass
        finally:
            holder.kill()
    with Workspace(tmp_path).locked(0.0):
        pass


def test_work_folders_differ_by_job_and_payload() -> None:
    names = {
        workspace_name("r/iter-1/train", job()),
        workspace_name("r_iter-1/train", job()),
        workspace_name("r/iter-1/train", job(output="models/c")),
    }
    assert len(names) == 3
    assert workspace_name("r/iter-1/train", job()) in names


def test_old_work_is_removed_and_work_in_use_is_not(tmp_path: Path) -> None:
    for name in ("old", "busy", "new"):
        (tmp_path / name).mkdir()
    with Workspace(tmp_path / "busy").locked(0.0):
        for name in ("old", "busy", "busy/lock"):
            os.utime(tmp_path / name, (0, 0))
        assert remove_old(tmp_path, keep_days=7) == ["old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["busy", "new"]


def test_the_id_of_a_job_is_its_content() -> None:
    assert request_for(job()) == request_for(job())
    assert request_for(job()).id != request_for(job(data="e.jsonl")).id
    assert request_for(job()).id.startswith("train/sft/")


def publish(store: ArtifactStore, job_id: str, asked: SftJob | None) -> None:
    with store.scratch_folder() as scratch:
        (scratch / "f").mkdir()
        (scratch / "f" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
        (scratch / "f" / "tokenizer.json").write_text("{}")
        if asked is not None:
            (scratch / "f" / "training_job.json").write_text(canonical(asked) + "\n")
        write_manifest(
            scratch / "f", version="models/b", parameters=1, tied_embeddings=False, lineage={"job_id": job_id},
            metrics={"loss": 1.0},
        )  # fmt: skip
        assert store.publish_folder(scratch / "f", "models/b")


def test_published_work_is_adopted_by_the_same_job_whatever_its_id(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    assert published_result(store, "a", job()) is None
    publish(store, "a", job())
    for job_id in ("a", "b"):
        found = published_result(store, job_id, job())
        assert found is not None
        assert found.metrics == {"loss": 1.0}


def test_output_of_another_job_is_a_conflict(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    publish(store, "a", job())
    with pytest.raises(Conflict, match="choose another output"):
        published_result(store, "b", job(data="other.jsonl"))
