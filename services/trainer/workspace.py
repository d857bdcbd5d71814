"""A job's work folder: its lock, its log, its resumable trainer checkpoints. Local disk, outlives the process."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel

from services.contracts.errors import Unavailable
from services.contracts.training import NOT_IDENTITY

COMPLETE_NAME = "COMPLETE.json"
"""Written into a trainer checkpoint after all its other files: name -> bytes. transformers writes them one by one, so
a checkpoint without it, or whose files differ from it, was cut short by a kill and is not resumed from."""
LOCK_POLL_SECONDS = 0.1
LOG_TAIL_BYTES = 4000


def workspace_name(job_id: str, job: BaseModel) -> str:
    """Folder name of a job's work: readable, and equal only for the same id and the same payload."""
    digest = hashlib.sha256(f"{job_id}\n{canonical(job)}".encode()).hexdigest()[:16]
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '_', job_id)[:80]}-{digest}"


def canonical(job: BaseModel) -> str:
    """A job as JSON that is equal for equal work: what only says where the curves go does not count."""
    found = job.model_dump(mode="json", exclude={"config": set(NOT_IDENTITY)})
    return json.dumps(found, sort_keys=True, separators=(",", ":"))


class Workspace:
    """Paths in one job's work folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.job_file = folder / "job.json"
        self.log_file = folder / "child.log"
        self.lock_file = folder / "lock"
        self.trainer = folder / "trainer"
        self.output = folder / "output"

    @contextmanager
    def locked(self, wait_seconds: float) -> Iterator[None]:
        """Hold the folder for this process. The kernel lets go of it when the process dies, however it dies.

        Raises:
            Unavailable: an earlier attempt at the same job still lives after `wait_seconds`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            deadline = time.monotonic() + wait_seconds
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        holder = os.pread(handle, 20, 0).decode().strip()
                        raise Unavailable(
                            f"an earlier attempt at this job still runs (pid {holder}, work folder {self.folder}); "
                            f"waited {wait_seconds:.0f} s for it to end"
                        ) from None
                    time.sleep(LOCK_POLL_SECONDS)
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(handle)

    def log_tail(self) -> str:
        """The last few lines the libraries logged, for an error message."""
        try:
            data = self.log_file.read_bytes()[-LOG_TAIL_BYTES:]
        except FileNotFoundError:
            return ""
        lines = [line.strip() for line in data.decode(errors="replace").splitlines() if line.strip()]
        return "\n".join(lines[-8:])

    def remove(self) -> None:
        """Throw the work away, after its result is published."""
        shutil.rmtree(self.folder, ignore_errors=True)


def mark_complete(checkpoint: Path) -> None:
    """Note that a trainer checkpoint is whole. Called after transformers wrote the last of its files."""
    sizes: dict[str, int] = {}
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file() and file.name != COMPLETE_NAME:
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
            sizes[str(file.relative_to(checkpoint))] = file.stat().st_size
    temporary = checkpoint / f".{COMPLETE_NAME}"
    with open(temporary, "w") as handle:
        json.dump(sizes, handle)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, checkpoint / COMPLETE_NAME)


def is_complete(checkpoint: Path) -> bool:
    """Whether every file of a trainer checkpoint is there with its size."""
    try:
        sizes: dict[str, int] = json.loads((checkpoint / COMPLETE_NAME).read_text())
        return bool(sizes) and all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def resumable_checkpoint(trainer: Path) -> Path | None:
    """The newest whole trainer checkpoint; those cut short are removed, so that nothing takes them for whole."""
    steps: list[tuple[int, Path]] = []
    for folder in trainer.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if match and is_complete(folder):
            steps.append((int(match[1]), folder))
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return max(steps)[1] if steps else None


def remove_old(parent: Path, keep_days: float) -> list[str]:
    """Remove work folders that nobody touched for `keep_days` and nobody holds. Returns their names."""
    removed: list[str] = []
    for folder in sorted(parent.glob("*")) if parent.is_dir() else []:
        newest = max((entry.stat().st_mtime for entry in [folder, *folder.glob("*")]), default=0.0)
        if time.time() - newest < keep_days * 86400:
            continue
        try:
            with Workspace(folder).locked(0.0):
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder.name)
        except Unavailable:
            continue
    return removed
