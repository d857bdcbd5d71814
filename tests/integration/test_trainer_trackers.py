"""`report_to`: curves in TensorBoard, wandb (offline), MLflow (file store) and trackio (local), by the real ones."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import struct
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from prometheus_client import REGISTRY
from redis.asyncio import Redis
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ratchet.local.redis_server import RedisServer
from services.contracts.jobs import Job, JobState
from services.contracts.training import TrainingResult
from tests.fixtures.trainer import (
    TrainerUnderTest,
    config,
    make_pairs,
    preference_rows,
    put_jsonl,
    put_pairs,
    sft_rows,
    trainer_service,
    write_model,
)

pytestmark = pytest.mark.timeout(600)


@asynccontextmanager
async def service(redis_url: str, root: Path, **environment: str) -> AsyncIterator[TrainerUnderTest]:
    """A trainer with a model and data, whose operator has set these variables before its start."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in environment.items():
            patched.setenv(name, value)
        write_model(root / "staging" / "base")
        async with trainer_service(redis_url, root, trainer_tracker_end_seconds=60) as running:
            put_jsonl(running.store, "datasets/sft.jsonl", sft_rows(48))
            job = await running.run(
                kind="import_model", model_kind="policy", source="store:staging/base", output="models/base"
            )
            assert job.state is JobState.SUCCEEDED, job.problem
            yield running


@pytest_asyncio.fixture
async def trainer(redis_server: RedisServer, redis_client: Redis, tmp_path: Path) -> AsyncIterator[TrainerUnderTest]:
    async with service(redis_server.url, tmp_path, WANDB_MODE="offline", WANDB_PROJECT="mine") as running:
        yield running


def sft(output: str = "models/sft", **changes: Any) -> dict[str, Any]:
    return {
        "kind": "sft", "start": "models/base", "data": "datasets/sft.jsonl", "config": config(**changes),
        "output": output,
    }  # fmt: skip


def scalars(store: Path, job: Job) -> EventAccumulator:
    """What TensorBoard itself reads of a job's folder."""
    found = EventAccumulator(str(store / "logs" / "tensorboard" / job.id))
    found.Reload()
    return found


def steps(found: EventAccumulator, tag: str) -> list[int]:
    return [event.step for event in found.Scalars(tag)]


async def test_tensorboard_gets_the_curves_of_every_kind_in_a_folder_per_job(
    trainer: TrainerUnderTest, tmp_path: Path
) -> None:
    put_jsonl(trainer.store, "datasets/preferences.jsonl", preference_rows(40))
    pairs = put_pairs(trainer.store, "runs/r/iter-1/pairs.parquet", make_pairs(40))
    board: dict[str, Any] = {"report_to": ["tensorboard"]}
    jobs = {
        "train/mean_token_accuracy": sft(**board),
        "train/accuracy": {
            "kind": "reward_model", "start": "models/sft", "data": "datasets/preferences.jsonl",
            "config": config(**board), "output": "models/rm",
        },
        "train/rewards/accuracies": {
            "kind": "dpo", "start": "models/sft", "reference": "models/base", "pairs": [pairs],
            "config": config(**board), "output": "runs/r/iter-1/checkpoint",
        },
    }  # fmt: skip
    margins = {"reward_model": "train/margin", "dpo": "train/rewards/margins"}
    for accuracy, request in jobs.items():
        job = await trainer.run(**request)
        assert job.state is JobState.SUCCEEDED, job.problem
        found = scalars(tmp_path, job)
        curve = TrainingResult.model_validate(job.result).curve
        for tag in filter(None, ("train/loss", accuracy, margins.get(request["kind"]))):
            assert steps(found, tag) == [point.step for point in curve], tag
        assert [event.value for event in found.Scalars("train/loss")] == pytest.approx([p.loss for p in curve])
        assert not (job.progress or {}).get("warning")


async def test_an_attempt_that_goes_on_after_a_kill_goes_on_with_the_same_run_and_doubles_no_point(
    trainer: TrainerUnderTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await trainer.submit(**sft(num_train_epochs=100, save_steps=20, report_to=["tensorboard", "mlflow"]))
    async for _ in trainer.events(job.id):
        if sent(tmp_path, "tensorboard") > 20 and sent(tmp_path, "mlflow") > 20:
            break
    os.kill(trainer.child_pid(), signal.SIGKILL)
    before = {name: sent(tmp_path, name) for name in ("tensorboard", "mlflow")}
    ended = await trainer.finished(job.id)
    assert ended.state is JobState.SUCCEEDED, ended.problem
    assert ended.attempts == 2
    resumed = TrainingResult.model_validate(ended.result).resumed_from_step
    assert resumed is not None
    # A tracker's thread may lag behind the save: what it lacks is filled in from there.
    assert 20 <= resumed < 600
    assert all(step < 600 for step in before.values()), "the kill came after the end"
    board = steps(scalars(tmp_path, ended), "train/loss")
    assert board == sorted(set(board)), "a step is there twice"
    assert board[0] < resumed < board[-1] == 600
    assert len(list((tmp_path / "logs" / "tensorboard" / ended.id).glob("events.*"))) == 2
    run = only_mlflow_run(tmp_path / "logs" / "mlruns", "ratchet", monkeypatch)
    assert (run["name"], run["status"]) == (ended.id, "FINISHED")
    assert max(Counter(run["loss"]).values()) == 1, "a step is there twice"
    assert min(run["loss"]) < resumed < max(run["loss"]) == 600


def sent(root: Path, tracker: str) -> int:
    """The last step that a tracker of the one job at work has got."""
    notes = list((root / ".work" / "train").glob(f"*/tracker-{tracker}.json"))
    return json.loads(notes[0].read_text())["step"] if notes else -1


def only_mlflow_run(folder: Path, experiment: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Name, status and the steps of the loss of the one run of an MLflow file store."""
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient(tracking_uri=folder.as_uri())
    known = client.get_experiment_by_name(experiment)
    assert known is not None
    runs = client.search_runs([known.experiment_id])
    assert len(runs) == 1, runs
    history = client.get_metric_history(runs[0].info.run_id, "loss")
    return {
        "name": runs[0].info.run_name, "status": runs[0].info.status, "loss": [m.step for m in history],
        "values": [m.value for m in history],
    }  # fmt: skip


async def test_wandb_mlflow_and_trackio_get_the_curves_under_their_own_settings(
    trainer: TrainerUnderTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = sft(report_to=["wandb", "mlflow", "trackio"])
    job = await trainer.run(**request)
    assert job.state is JobState.SUCCEEDED, job.problem
    assert not (job.progress or {}).get("warning")
    losses = {point.step: point.loss for point in TrainingResult.model_validate(job.result).curve}

    run = only_mlflow_run(tmp_path / "logs" / "mlruns", "ratchet", monkeypatch)
    assert (run["name"], run["status"]) == (job.id, "FINISHED")
    assert dict(zip(run["loss"], run["values"], strict=True)) == pytest.approx(losses)

    with sqlite3.connect(tmp_path / "logs" / "trackio" / "ratchet.db") as database:
        rows = database.execute("select run_name, metrics from metrics").fetchall()
    assert {name for name, _ in rows} == {job.id}
    assert sum('"train/loss"' in str(metrics) for _, metrics in rows) == len(losses)

    assert wandb_losses(tmp_path / "logs", "mine") == pytest.approx(losses)


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log, the format of wandb's files: blocks of 32 KiB, parts with a 7-byte header."""
    whole, position = b"", 7  # wandb's own header
    while position + 7 <= len(log):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", log, position + 4)
        whole += log[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def wandb_losses(folder: Path, project: str) -> dict[int, float]:
    """Step -> loss of the one offline run of wandb."""
    from wandb.proto import wandb_internal_pb2 as records

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    found: dict[int, float] = {}
    for data in leveldb_records(file.read_bytes()):
        record = records.Record()  # pyright: ignore[reportAttributeAccessIssue]  # made at import
        record.ParseFromString(data)
        if record.HasField("run"):
            assert record.run.project == project
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if "train/loss" in items:
            found[items["train/global_step"]] = items["train/loss"]
    return found


async def test_a_tracker_out_of_reach_is_given_up_loudly_and_the_training_goes_on(
    redis_server: RedisServer, redis_client: Redis, tmp_path: Path
) -> None:
    labels = {"tracker": "mlflow"}
    before = REGISTRY.get_sample_value("ratchet_trainer_tracker_failures_total", labels) or 0
    away = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    async with service(redis_server.url, tmp_path, **away) as trainer:
        job = await trainer.run(**sft(report_to=["mlflow", "tensorboard"]))
    assert job.state is JobState.SUCCEEDED, job.problem
    assert "mlflow gets no more of this training" in (job.progress or {})["warning"]
    assert REGISTRY.get_sample_value("ratchet_trainer_tracker_failures_total", labels) == before + 1
    assert steps(scalars(tmp_path, job), "train/loss")  # the other one has all


async def test_a_tracker_that_is_not_installed_is_refused_at_the_door_and_at_the_start(
    trainer: TrainerUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.trainer.trackers.find_spec", lambda name: None if name == "wandb" else object())
    refused = await trainer.client.post("/v1/jobs", json=sft(report_to=["wandb"]))
    assert refused.status_code == 422
    assert refused.json()["field"] == "config.report_to"
    assert "pip install wandb" in refused.json()["detail"]
    # A run's jobs come through the queue, where nobody knows what the trainer has installed.
    from services.contracts.jobs import JobRequest

    await trainer.trainer.queue.enqueue(
        JobRequest(id="r/iter-1/train", queue="train", kind="sft", payload=sft(report_to=["wandb"]), topic="r")
    )
    async for event in trainer.trainer.events.follow("r"):
        if event.type == "job.failed":
            break
    job = await trainer.job("r/iter-1/train")
    assert job.problem is not None
    assert (job.attempts, job.problem.field) == (1, "config.report_to")


async def test_other_trackers_make_no_other_job_and_no_other_model(trainer: TrainerUnderTest) -> None:
    first = await trainer.run(**sft())
    second = await trainer.submit(**sft(report_to=["tensorboard"]))
    assert second.id == first.id
    assert second.result == first.result
    unknown = await trainer.client.post("/v1/jobs", json=sft("models/x", report_to=["tensorbord"]))
    assert unknown.status_code == 422
    assert "config.report_to.0" in unknown.text
