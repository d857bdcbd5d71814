"""The training process: `python -m services.trainer.child JOBFILE`, or `--wait` for a spare with its imports done.

It speaks JSON lines (`protocol.ChildMessage`) on what was its standard output; whatever libraries print goes to the log
in the job's work folder.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import IO

from services.contracts.errors import JobFailed, RatchetError
from services.contracts.problems import Problem
from services.contracts.training import (
    DpoJob,
    ImportModelJob,
    RewardModelJob,
    SftJob,
    Tracker,
    TrainingProgress,
    TrainingResult,
)
from services.platform.processes import die_with_parent
from services.trainer.protocol import ChildJob, ChildMessage, TrackerFailure
from services.trainer.workspace import Workspace

WAIT = "--wait"
PARENT_VARIABLE = "RATCHET_TRAINER_PARENT"
"""Process id of the service: a child that finds another parent at its start is an orphan already."""
UNUSED_LIBRARIES = ("deepspeed", "peft", "scipy", "tensorflow", "vllm", "wandb")
"""Installed beside us for others. transformers, accelerate and TRL import them when they can, which costs seconds a job
and nothing of it is used; a name that is None in sys.modules counts as not installed."""
WARM_MODULES = (
    "services.trainer.dpo", "services.trainer.imports", "services.trainer.reward_model", "services.trainer.sft",
    "transformers.models.llama.modeling_llama", "transformers.models.qwen2.modeling_qwen2",
)  # fmt: skip


class Reporter:
    """Writes messages to the service. When nobody reads any more, the process has no reason to live."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self._one_line = threading.Lock()

    def send(self, message: ChildMessage) -> None:
        """One JSON line. Thread-safe."""
        with self._one_line:
            self.stream.write(message.model_dump_json(exclude_defaults=True).encode() + b"\n")
            self.stream.flush()

    def progress(self, progress: TrainingProgress) -> None:
        """One progress event."""
        self.send(ChildMessage(type="progress", progress=progress, device_peak_bytes=device_peak_bytes()))

    def tracker_failed(self, tracker: Tracker, detail: str) -> None:
        """A tracker was given up."""
        self.send(ChildMessage(type="tracker", tracker=TrackerFailure(tracker=tracker, detail=detail)))


def main(arguments: list[str]) -> int:
    """Run one job. Returns the exit status: 0 when a result or an error was reported."""
    die_with_parent(int(os.environ[PARENT_VARIABLE]) if PARENT_VARIABLE in os.environ else None)
    for name in UNUSED_LIBRARIES:
        sys.modules.setdefault(name, None)  # pyright: ignore[reportArgumentType]
    reporter = Reporter(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # what libraries print must not look like a message
    if arguments[0] == WAIT:
        warm_up()
        reporter.send(ChildMessage(type="ready"))
        line = sys.stdin.readline()
        if not line:
            return 0
        job_file = Path(line.strip())
    else:
        job_file = Path(arguments[0])
    job = ChildJob.model_validate_json(job_file.read_bytes())
    workspace = Workspace(Path(job.work))
    _log_to(workspace.log_file)
    reporter.progress(TrainingProgress(phase="starting"))
    try:
        with workspace.locked(job.lock_seconds):
            result = run_job(job, workspace, reporter)
        reporter.send(ChildMessage(type="result", result=result))
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        reporter.send(error_message(error, workspace))
    return 0


def warm_up() -> None:
    """Import what every job imports, so that a job pays only for its own model class."""
    for name in WARM_MODULES:
        import_module(name)
    import transformers

    # transformers imports lazily: naming a class is what loads it
    for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer"):
        getattr(transformers, name)


def run_job(job: ChildJob, workspace: Workspace, reporter: Reporter) -> TrainingResult:
    """Do the job, or adopt its published result."""
    from services.platform.store import ArtifactStore
    from services.trainer.published import published_result
    from services.trainer.task import Task

    store = ArtifactStore(job.store_url)
    if (found := published_result(store, job.job_id, job.job)) is not None:
        return found
    task = Task(
        job.job_id, store, workspace, reporter.progress, time.monotonic(), job.allow_hub, job.tracking,
        reporter.tracker_failed,
    )  # fmt: skip
    match job.job:
        case ImportModelJob():
            from services.trainer.imports import run_import

            return run_import(task, job.job)
        case SftJob():
            from services.trainer.sft import run_sft

            return run_sft(task, job.job)
        case RewardModelJob():
            from services.trainer.reward_model import run_reward_model

            return run_reward_model(task, job.job)
        case DpoJob():
            from services.trainer.dpo import run_dpo

            return run_dpo(task, job.job)


def device_peak_bytes() -> int | None:
    """The most GPU memory that torch has had allocated in this process; None without a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_allocated())


def error_message(error: Exception, workspace: Workspace) -> ChildMessage:
    """An exception as the child's last message: ours as they are, out of memory to be tried again."""
    if isinstance(error, RatchetError):
        return ChildMessage(type="error", problem=error.problem(), retryable=error.retryable)
    last = traceback.format_exception_only(error)[-1].strip()
    if _out_of_memory(error):
        problem = JobFailed(
            f"out of memory: {last[:300]}. Lower config.micro_batch_size, or set gradient_checkpointing"
        ).problem()
        return ChildMessage(type="error", problem=problem, retryable=True)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (at {Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    problem: Problem = JobFailed(f"{last[:500]}{place}; the whole trace is in {workspace.log_file}").problem()
    return ChildMessage(type="error", problem=problem)


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


def _log_to(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
