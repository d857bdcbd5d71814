"""Where training curves go: what is set for each tracker, what is refused, and what names a job."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from pydantic import SecretStr, ValidationError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from services.contracts.errors import InvalidInput
from services.contracts.trackers import InstalledTrackers
from services.contracts.training import NOT_IDENTITY, DpoConfig, RewardModelConfig, SftConfig, SftJob, TrainingProgress
from services.platform.store import ArtifactStore
from services.trainer import loop, metrics, tracking
from services.trainer.app import build_app
from services.trainer.jobs import request_for
from services.trainer.settings import TrainerSettings
from services.trainer.task import Task
from services.trainer.trackers import Tracking, check_installed, default_folder, environment, run_id
from services.trainer.tracking import Curves
from services.trainer.workspace import Workspace, canonical, workspace_name
from tests.fixtures.trainer import config

PLACE = Tracking(folder="/logs", project="ratchet", end_seconds=5.0)
JOB = "r/iter-1/train"
TOKEN = "trainer-tests-0123456789"


def job(**changes: Any) -> SftJob:
    return SftJob.model_validate(
        {"start": "models/a", "data": "datasets/d.jsonl", "config": config(**changes), "output": "models/b"}
    )


@pytest.mark.parametrize("kind", [SftConfig, RewardModelConfig, DpoConfig])
def test_every_training_takes_trackers_and_refuses_unknown_ones(kind: type[SftConfig]) -> None:
    assert kind.model_validate(config(report_to=["tensorboard", "wandb"])).report_to == ("tensorboard", "wandb")
    for wrong in (["tensorbord"], ["mlflow", "mlflow"]):
        with pytest.raises(ValidationError, match="report_to"):
            kind.model_validate(config(report_to=wrong))


def test_trackers_are_no_part_of_what_names_a_job_and_its_work() -> None:
    plain, watched = job(), job(report_to=["tensorboard", "mlflow"])
    assert canonical(plain) == canonical(watched)
    assert request_for(plain).id == request_for(watched).id
    assert workspace_name("x", plain) == workspace_name("x", watched)
    assert request_for(watched).payload["config"]["report_to"] == ["tensorboard", "mlflow"]  # but they get there
    assert canonical(job(seed=8)) != canonical(plain)
    assert "report_to" not in plain.config.model_dump_json(exclude=set(NOT_IDENTITY))


def test_each_tracker_gets_a_place_under_the_job_s_id() -> None:
    found = environment(("tensorboard", "wandb", "mlflow", "trackio"), PLACE, JOB, {}, mlflow_run="abc")
    assert found["TENSORBOARD_LOGGING_DIR"] == "/logs/tensorboard/r/iter-1/train"
    assert found["WANDB_RUN_ID"] == run_id(JOB)
    assert (found["WANDB_RESUME"], found["WANDB_PROJECT"]) == ("allow", "ratchet")
    assert (found["MLFLOW_TRACKING_URI"], found["MLFLOW_RUN_ID"]) == ("file:///logs/mlruns", "abc")
    assert found["TRACKIO_DIR"] == "/logs/trackio"
    assert environment((), PLACE, JOB, {}) == {}
    assert set(environment(("tensorboard",), PLACE, JOB, {})) == {"TENSORBOARD_LOGGING_DIR"}


def test_what_the_operator_sets_counts() -> None:
    given = {
        "WANDB_PROJECT": "mine", "WANDB_DIR": "/w", "MLFLOW_TRACKING_URI": "https://mlflow.example",
        "MLFLOW_EXPERIMENT_NAME": "mine", "TRACKIO_DIR": "/t", "TENSORBOARD_LOGGING_DIR": "/boards",
    }  # fmt: skip
    found = environment(("tensorboard", "wandb", "mlflow", "trackio"), PLACE, JOB, given)
    assert not {"WANDB_PROJECT", "WANDB_DIR", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_DIR"} & set(
        found
    )
    assert found["TENSORBOARD_LOGGING_DIR"] == "/boards/r/iter-1/train"
    assert "MLFLOW_ALLOW_FILE_STORE" not in found


def test_a_wandb_run_id_has_no_slash_and_tells_jobs_apart() -> None:
    ids = {run_id(name) for name in ("r/iter-1/train", "r-iter-1-train", "r/iter-1-train")}
    assert len(ids) == 3
    assert not any("/" in found for found in ids)


def test_logs_stand_in_a_local_store_and_beside_the_work_otherwise(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    assert default_folder(store, None, None) == tmp_path / "store" / "logs"
    assert default_folder(store, tmp_path / "elsewhere", None) == tmp_path / "elsewhere"
    assert default_folder(ArtifactStore("memory://x"), None, tmp_path / "work") == tmp_path / "work" / "logs"


def test_a_tracker_that_is_not_installed_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed(("tensorboard", "wandb", "mlflow", "trackio"))
    without(monkeypatch, "mlflow", "wandb")
    with pytest.raises(InvalidInput, match="pip install mlflow-skinny in") as refused:
        check_installed(("tensorboard", "mlflow"))
    assert refused.value.field == "config.report_to"
    # building the image anew must not lose what it has
    assert 'RATCHET_TRACKERS="tensorboard mlflow-skinny trackio"' in refused.value.detail


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    monkeypatch.setattr("services.trainer.trackers.find_spec", lambda name: None if name in missing else object())


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """The trainer's routes, without its worker and Redis."""
    app = build_app(TrainerSettings(token=SecretStr(TOKEN), store_url=str(tmp_path)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://trainer") as client:
        yield client


async def test_the_trainer_tells_which_trackers_it_has(api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "wandb", "trackio")
    answer = InstalledTrackers.model_validate_json((await api.get("/v1/trackers")).content)
    assert answer.trackers == ("tensorboard", "mlflow")


async def test_a_job_for_a_tracker_that_is_not_installed_is_refused_when_it_is_sent(
    api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "wandb")
    body = job(report_to=["wandb"]).model_dump(mode="json")
    refused = await api.post("/v1/jobs", json=body, headers={"Authorization": f"Bearer {TOKEN}"})
    assert (refused.status_code, refused.json()["field"]) == (422, "config.report_to")
    assert "pip install wandb" in refused.json()["detail"]


# --- delivery


class Recorder(TrainerCallback):
    """A tracker that keeps what it gets, or fails, or hangs."""

    def __init__(self, trouble: str | None = None) -> None:
        self.trouble = trouble
        self.got: list[tuple[int, dict[str, Any]]] = []
        self.release = threading.Event()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trouble == "unreachable":
            raise ConnectionError("no route to host")
        if self.trouble == "exits":
            sys.exit(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.trouble == "hangs":
            self.release.wait(30)
        self.got.append((state.global_step, logs))


@pytest.fixture
def trackers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Recorder]]:
    found = {"tensorboard": Recorder(), "trackio": Recorder()}
    monkeypatch.setattr(tracking, "_integration", lambda name: found[name])
    monkeypatch.setattr(tracking, "_finish", lambda name, callback, *, failed: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    yield found
    for recorder in found.values():
        recorder.release.set()


class Training:
    """Callback events as transformers sends them."""

    def __init__(self, folder: Path, history: list[dict[str, Any]] | None = None, end_seconds: float = 5.0) -> None:
        self.warnings: list[tuple[str, str]] = []
        self.arguments = TrainingArguments(output_dir=str(folder / "trainer"), report_to=[])
        self.state = TrainerState()
        self.state.log_history = history or []
        place = Tracking(folder=str(folder / "logs"), project="ratchet", end_seconds=end_seconds)
        warn = lambda name, why: self.warnings.append((name, why))  # noqa: E731
        self.curves = Curves(("tensorboard", "trackio"), place, JOB, folder / "work", self.arguments, warn)
        self.curves.on_train_begin(self.arguments, self.state, TrainerControl())

    def log(self, step: int, **logs: Any) -> None:
        self.state.global_step = step
        self.state.log_history.append({**logs, "step": step})
        self.curves.on_log(self.arguments, self.state, TrainerControl(), logs=logs)


def test_a_resumed_training_sends_no_step_twice_and_leaves_none_out(
    tmp_path: Path, trackers: dict[str, Recorder]
) -> None:
    first = Training(tmp_path)
    for step in (2, 4, 6):
        first.log(step, loss=1.0 / step)
    first.curves.close(failed=True)
    # The trainer goes on from its save at step 4, and one tracker had got nothing: it was killed while it started.
    (tmp_path / "work" / "tracker-trackio.json").unlink()
    late = trackers["trackio"] = Recorder()
    history = [{"loss": 0.5, "step": 2}, {"loss": 0.25, "step": 4}]
    second = Training(tmp_path, history)
    for step in (5, 6, 7, 8):
        second.log(step, loss=1.0 / step)
    second.log(8, train_runtime=1.0)
    second.curves.close(failed=False)
    assert [step for step, _ in trackers["tensorboard"].got] == [2, 4, 6, 7, 8, 8]
    assert [step for step, _ in late.got] == [2, 4, 5, 6, 7, 8, 8]
    assert first.warnings == second.warnings == []
    # An attempt after the last one (killed while it saved the model) has nothing to add.
    third = Training(tmp_path, history)
    third.log(8, loss=1.0 / 8)
    third.log(8, train_runtime=2.0)
    third.curves.close(failed=False)
    assert len(late.got) == 7


@pytest.mark.parametrize("trouble", ["unreachable", "exits"])
def test_a_tracker_that_fails_is_given_up_and_the_others_go_on(
    tmp_path: Path, trackers: dict[str, Recorder], trouble: str
) -> None:
    trackers["trackio"].trouble = trouble
    training = Training(tmp_path)
    training.log(1, loss=0.5)
    training.curves.close(failed=False)
    ((name, why),) = training.warnings
    assert name == "trackio"
    assert ("no route to host" in why) == (trouble == "unreachable")
    assert trackers["tensorboard"].got == [(1, {"loss": 0.5})]


def test_a_tracker_that_hangs_costs_the_training_a_bounded_time(tmp_path: Path, trackers: dict[str, Recorder]) -> None:
    trackers["trackio"].trouble = "hangs"
    training = Training(tmp_path, end_seconds=0.3)
    began = time.monotonic()
    for step in range(1, 50):
        training.log(step, loss=0.5)
    training.curves.close(failed=False)
    assert time.monotonic() - began < 5
    assert [name for name, _ in training.warnings] == ["trackio"]
    assert len(trackers["tensorboard"].got) == 49


def test_an_entry_that_was_sent_when_the_attempt_was_killed_is_rather_sent_twice_than_left_out(
    tmp_path: Path, trackers: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tracking._Sent.note

    def killed_before_the_note(sent: Any, step: int, logs: Any) -> None:
        if step == 4:
            raise SystemExit
        note(sent, step, logs)

    monkeypatch.setattr(tracking._Sent, "note", killed_before_the_note)
    first = Training(tmp_path)
    first.log(2, loss=0.5)
    first.log(4, loss=0.25)
    first.curves.close(failed=True)
    monkeypatch.setattr(tracking._Sent, "note", note)
    second = Training(tmp_path, [{"loss": 0.5, "step": 2}, {"loss": 0.25, "step": 4}])
    second.log(6, loss=0.1)
    second.curves.close(failed=False)
    assert [step for step, _ in trackers["tensorboard"].got] == [2, 4, 4, 6]


@pytest.mark.parametrize("trouble", ["a file is in the way", "read-only"])
def test_a_folder_that_trackers_cannot_use_costs_the_trackers_and_not_the_training(
    tmp_path: Path, trackers: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    (tmp_path / "occupied").write_text("")
    folder = tmp_path / "occupied" / "logs"
    if trouble == "read-only":
        folder = tmp_path / "logs"
        make = Path.mkdir

        def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
            if path == folder:
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            make(path, *args, **kwargs)

        monkeypatch.setattr(Path, "mkdir", refuse)
    told: dict[str, str] = {}
    task = Task(
        "x", ArtifactStore(str(tmp_path / "store")), Workspace(tmp_path / "work"), lambda progress: None, 0.0,
        tracking=Tracking(folder=str(folder), project="ratchet", end_seconds=5.0),
        tracker_failed=lambda name, why: told.update({name: why}),
    )  # fmt: skip
    trainer: Any = SimpleNamespace(args=TrainingArguments(output_dir=str(tmp_path / "o"), report_to=[]))
    trained = False
    with loop._curves(trainer, task, job(report_to=["tensorboard", "trackio"]).config):
        trained = True
    assert trained
    assert set(told) == {"tensorboard", "trackio"}
    assert all("RATCHET_TRAINER_LOG_FOLDER" in why and str(folder) in why for why in told.values())


# --- metrics of the running job


def test_a_running_job_s_figures_are_shown_and_go_with_it() -> None:
    def value(name: str, **labels: str) -> float | None:
        return REGISTRY.get_sample_value(f"ratchet_trainer_{name}", {"kind": "sft", **labels})

    before = value("steps_total") or 0.0
    with metrics.job_figures("sft") as figures:
        for step in (5, 7, 12):
            figures.update(
                TrainingProgress(phase="training", step=step, total_steps=24, loss=1.0 / step),
                os.getpid(),
                4096,
            )
        assert value("job_running") == 1
        assert value("loss") == 1.0 / 12
        assert value("progress_ratio") == 0.5
    assert value("job_running") == 0
    assert value("loss") is None
    # Steps before the first message belong to an earlier attempt.
    assert value("steps_total") == before + 7
    assert (value("peak_memory_bytes", memory="host") or 0) > 1e7
    assert value("peak_memory_bytes", memory="device") == 4096
