"""Training curves on their way to trackers, through transformers' own integrations.

Each tracker has a thread of its own: one that hangs or cannot be reached costs the training nothing. It is given up at
its first error, which is told (log, metric, the job's progress); the training goes on. What a tracker has got is noted
beside the trainer's checkpoints once it has taken it, so an attempt that goes on from a save leaves nothing out, and
repeats at most the entry during which the attempt before it was killed: each entry arrives at least once.
"""

from __future__ import annotations

import copy
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from services.contracts.training import Tracker
from services.trainer.trackers import Tracking, environment, project_of

MOST_WAITING = 10_000
"""Log entries a hanging tracker may leave waiting: hours of a training."""
SUMMARY = "train_runtime"
"""A figure of the one log entry that transformers writes at the end."""

Warn = Callable[[Tracker, str], None]
"""Tells of a tracker that was given up, and why. Called from its thread."""


@dataclass(frozen=True)
class _Call:
    event: str
    state: TrainerState
    extra: dict[str, Any]


@dataclass
class _Sent:
    """What a tracker has got of a job, over all attempts. Kept in a file."""

    file: Path
    step: int = -1
    summary: bool = False
    run: str | None = None

    @classmethod
    def read(cls, file: Path) -> _Sent:
        try:
            found = json.loads(file.read_text())
            return cls(file, int(found["step"]), bool(found["summary"]), found["run"])
        except (OSError, ValueError, KeyError):
            return cls(file)

    def write(self) -> None:
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"step": self.step, "summary": self.summary, "run": self.run}))
        os.replace(temporary, self.file)

    def has(self, step: int, logs: dict[str, Any]) -> bool:
        return self.summary if SUMMARY in logs else step <= self.step

    def note(self, step: int, logs: dict[str, Any]) -> None:
        self.step, self.summary = max(step, self.step), self.summary or SUMMARY in logs
        self.write()


class _Delivery:
    """One tracker at the end of a queue, in a thread of its own."""

    def __init__(self, name: Tracker, sent: _Sent, args: TrainingArguments, warn: Warn) -> None:
        self.name: Tracker = name
        self._sent = sent
        self._args = args
        self._warn = warn
        self._calls: queue.Queue[_Call | bool] = queue.Queue()
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, call: _Call) -> None:
        """Hand over an event. Never waits."""
        if self._calls.qsize() > MOST_WAITING:
            self._give_up(f"it took nothing for {MOST_WAITING:,} log entries")
        if not self._given_up.is_set():
            self._calls.put(call)

    def close(self, deadline: float, *, failed: bool) -> None:
        """Let it end what it has, until the deadline (monotonic seconds)."""
        self._calls.put(failed)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._give_up("it had not sent everything in time (RATCHET_TRAINER_TRACKER_END_SECONDS)")

    def _work(self) -> None:
        try:
            callback = _integration(self.name)
            while not isinstance(call := self._calls.get(), bool):
                self._pass_on(callback, call)
            _finish(self.name, callback, failed=call)
        except BaseException as error:  # SystemExit too: some libraries end the process when they cannot log in
            traceback.print_exc()
            self._give_up(f"{type(error).__name__}: {str(error).strip()[:300]}")

    def _pass_on(self, callback: TrainerCallback, call: _Call) -> None:
        if self._given_up.is_set():
            return
        if call.event == "on_log":
            self._log(callback, call.state, call.extra["logs"])
            return
        getattr(callback, call.event)(self._args, call.state, TrainerControl(), **call.extra)
        if call.event == "on_train_begin":
            self._begun(callback, call.state)

    def _begun(self, callback: TrainerCallback, state: TrainerState) -> None:
        """Note the run, and send what an earlier attempt had logged and was killed before it could send."""
        if self.name == "mlflow":
            import mlflow

            run = mlflow.active_run()
            self._sent.run = run.info.run_id if run is not None else None
            self._sent.write()
        for entry in state.log_history:
            then = copy.copy(state)
            then.global_step = int(entry["step"])
            self._log(callback, then, {name: value for name, value in entry.items() if name != "step"})

    def _log(self, callback: TrainerCallback, state: TrainerState, logs: dict[str, Any]) -> None:
        if not self._sent.has(state.global_step, logs):
            callback.on_log(self._args, state, TrainerControl(), logs=logs)  # pyright: ignore[reportCallIssue]
            self._sent.note(state.global_step, logs)

    def _give_up(self, why: str) -> None:
        if not self._given_up.is_set():
            self._given_up.set()
            self._warn(self.name, why)


class Curves(TrainerCallback):
    """Sends a training's log to its trackers. `close` it, whatever becomes of the training."""

    def __init__(
        self,
        names: Sequence[Tracker],
        tracking: Tracking,
        job_id: str,
        notes: Path,
        args: TrainingArguments,
        warn: Warn,
    ) -> None:
        notes.mkdir(parents=True, exist_ok=True)
        sent = {name: _Sent.read(notes / f"tracker-{name}.json") for name in names}
        mlflow_run = sent["mlflow"].run if "mlflow" in sent else None
        os.environ.update(environment(names, tracking, job_id, os.environ, mlflow_run))
        Path(tracking.folder).mkdir(parents=True, exist_ok=True)
        self._end_seconds = tracking.end_seconds
        self._deliveries: list[_Delivery] = []
        for name in names:
            its_args = copy.copy(args)
            its_args.run_name, its_args.project = job_id, project_of(name, tracking)
            self._deliveries.append(_Delivery(name, sent[name], its_args, warn))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the trackers' runs."""
        begun = copy.copy(state)
        begun.log_history = list(state.log_history)  # as of the save: the trainer adds to its own
        self._put("on_train_begin", begun, model=kwargs.get("model"))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Pass a log entry on."""
        self._put("on_log", state, logs=dict(logs or {}))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the trackers' runs; with their own settings they may keep the model."""
        self._put("on_train_end", state, model=kwargs.get("model"), processing_class=kwargs.get("processing_class"))

    def close(self, *, failed: bool) -> None:
        """Wait, for a bounded time, until all is sent."""
        deadline = time.monotonic() + self._end_seconds
        for delivery in self._deliveries:
            delivery.close(deadline, failed=failed)

    def _put(self, event: str, state: TrainerState, **extra: Any) -> None:
        for delivery in self._deliveries:
            # The trainer goes on counting in its own state.
            delivery.put(_Call(event, copy.copy(state), extra))


def _integration(name: Tracker) -> TrainerCallback:
    """transformers' callback for a tracker."""
    if name in sys.modules and sys.modules[name] is None:
        del sys.modules[name]  # the process was told to do without it, before it had this job
    from transformers.integrations.integration_utils import MLflowCallback, get_reporting_integration_callbacks

    class SynchronousMLflow(MLflowCallback):
        """Figures are sent one after the other, and errors are seen: we have a thread already."""

        def setup(self, args: Any, state: Any, model: Any) -> None:
            super().setup(args, state, model)
            self._async_log = False

    return SynchronousMLflow() if name == "mlflow" else get_reporting_integration_callbacks([name])[0]()


def _finish(name: Tracker, callback: TrainerCallback, *, failed: bool) -> None:
    """End the tracker's run where transformers leaves that to the end of the process, or was not asked to."""
    if name == "tensorboard" and (writer := getattr(callback, "tb_writer", None)) is not None:
        writer.close()
    if name == "wandb":
        import wandb

        wandb.finish(exit_code=1 if failed else 0)
    if name == "mlflow":
        import mlflow

        if mlflow.active_run() is not None:
            mlflow.end_run("FAILED" if failed else "FINISHED")
    if name == "trackio" and failed:
        import trackio

        trackio.finish()
