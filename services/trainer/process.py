"""Child processes: started, listened to, ended for certain; and a spare one that has done its imports beforehand."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from services.contracts.errors import JobFailed, RatchetError
from services.platform.logs import get_logger
from services.trainer.child import PARENT_VARIABLE, WAIT
from services.trainer.metrics import CHILD_DEATHS
from services.trainer.protocol import ChildMessage
from services.trainer.settings import TrainerSettings

log = get_logger(__name__)

LINE_BYTES = 16 << 20
"""Longest message: a result with its curve is some 50 kB."""
REPOSITORY = Path(__file__).parents[2]
END_SECONDS = 60.0
"""From the end of a child's messages to its own: an interpreter that tears down torch and CUDA takes a few."""


GONE_POLL_SECONDS = 0.05


class TrainingKilled(RatchetError):
    """The training process was ended from outside, or hung. Its job is tried again, from its last save."""

    status, code, title, retryable = 503, "training-killed", "Training process ended", True


class TrainingChild:
    """One child process, in a session of its own.

    Args:
        process: The process; its stdout carries messages.
        errors: Where its stderr goes until it has a job and thereby a log of its own.
    """

    def __init__(self, process: asyncio.subprocess.Process, errors: IO[bytes]) -> None:
        self.process = process
        self.errors = errors

    @property
    def alive(self) -> bool:
        """The process has not ended."""
        return self.process.returncode is None

    async def give(self, job_file: Path) -> None:
        """Hand a waiting child its job. Raises ConnectionError when it died meanwhile."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{job_file}\n".encode())
        await self.process.stdin.drain()

    async def messages(self, start_seconds: float, stall_seconds: float) -> AsyncIterator[ChildMessage]:
        """Its messages until its stdout ends.

        Raises:
            TrainingKilled: silence for `start_seconds` before its first message, `stall_seconds` after it.
            JobFailed: a line that is no message.
        """
        assert self.process.stdout is not None
        limit, what = start_seconds, "its imports"
        while True:
            try:
                line = await asyncio.wait_for(self.process.stdout.readline(), limit)
            except TimeoutError as error:
                CHILD_DEATHS.labels("hung").inc()
                raise TrainingKilled(
                    f"the training process (pid {self.process.pid}) reported nothing for {limit:.0f} s during {what}; "
                    "it is ended. If that is how long it takes, raise RATCHET_TRAINER_STALL_SECONDS or _START_SECONDS"
                ) from error
            if not line:
                return
            try:
                message = ChildMessage.model_validate_json(line)
            except ValidationError as error:
                raise JobFailed(f"the training process wrote what is no message: {line[:200]!r}") from error
            yield message
            limit, what = stall_seconds, message.progress.phase if message.progress else "its last step"

    async def ended(self, within_seconds: float) -> int:
        """Its exit status once its messages have ended; negative: the signal that ended it.

        Raises:
            TrainingKilled: it still lives after `within_seconds`: it hangs in its own end.
        """
        try:
            return await asyncio.wait_for(self.process.wait(), within_seconds)
        except TimeoutError as error:
            CHILD_DEATHS.labels("hung").inc()
            raise TrainingKilled(
                f"the training process (pid {self.process.pid}) sent no result, closed its output and did not end "
                f"within {within_seconds:g} s; it is ended"
            ) from error

    async def stop(self, term_seconds: float) -> None:
        """End the process and all it started: SIGTERM, then SIGKILL. Safe to call when it has ended."""
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.process.wait(), term_seconds)
        except TimeoutError:
            log.warning("child_ignores_sigterm", pid=self.process.pid, seconds=term_seconds)
        finally:
            # Also when this is itself cancelled: nothing of the session may stay.
            self._signal(signal.SIGKILL)
            self.errors.close()

    async def gone(self, within_seconds: float) -> bool:
        """Wait until the process and all of its session have ended, for only then is their memory free."""
        try:
            async with asyncio.timeout(within_seconds):
                await self.process.wait()
                while _members(self.process.pid):  # noqa: ASYNC110 - the kernel tells nobody of a session's end
                    await asyncio.sleep(GONE_POLL_SECONDS)
        except TimeoutError:
            return False
        return True

    def stderr_tail(self) -> str:
        """The last line it wrote before it had a log."""
        if self.errors.closed:
            return ""
        self.errors.seek(0, os.SEEK_END)
        self.errors.seek(max(0, self.errors.tell() - 2000))
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip()[:500] if lines else ""

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):
            return


def _members(group: int) -> list[int]:
    """Pids of a process group that have not ended. A zombie has: it holds no memory, only its number."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = entry.read_text().rsplit(")", 1)[1].split()[:3]
        except (OSError, IndexError, ValueError):  # it ended just now
            continue
        if int(its_group) == group and state not in "ZX":
            found.append(int(entry.parent.name))
    return found


class Launcher:
    """Starts children, and keeps one spare that has its imports done.

    The spare is made at start and after each job, never beside one: a job has the cores for itself.
    """

    def __init__(self, settings: TrainerSettings) -> None:
        self.settings = settings
        self._spare: TrainingChild | None = None
        self._closed = False

    async def start(self, job_file: Path) -> TrainingChild:
        """A child that does the job: the spare one if it lives, else a new one."""
        spare, self._spare = self._spare, None
        if spare is not None:
            if spare.alive:
                try:
                    await spare.give(job_file)
                except ConnectionError:
                    log.warning("spare_child_died", pid=spare.process.pid, error=spare.stderr_tail())
                else:
                    return spare
            await spare.stop(self.settings.trainer_term_seconds)
        return await self._spawn(str(job_file))

    async def prepare_spare(self) -> None:
        """Start the spare child, unless there is one or it is not wanted."""
        if self.settings.trainer_spare_child and not self._closed and (self._spare is None or not self._spare.alive):
            self._spare = await self._spawn(WAIT)

    async def close(self) -> None:
        """End the spare child."""
        self._closed = True
        spare, self._spare = self._spare, None
        if spare is not None:
            await spare.stop(self.settings.trainer_term_seconds)

    async def _spawn(self, argument: str) -> TrainingChild:
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.trainer.child", argument,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=errors,
            start_new_session=True, limit=LINE_BYTES, cwd=REPOSITORY, env=self._environment(),
        )  # fmt: skip
        log.info("child_started", child_pid=process.pid, spare=argument == WAIT)
        return TrainingChild(process, errors)

    def _environment(self) -> dict[str, str]:
        # No setting of a service, secrets among them: a job file says all, and what a child has may end in a log
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RATCHET_")}
        threads = str(self.settings.trainer_threads)
        # PASSIVE: threads that spin at a barrier cost 7 times the CPU (measured) when others use the cores too
        ours = {
            PARENT_VARIABLE: str(os.getpid()), "OMP_WAIT_POLICY": "PASSIVE",
            "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1", "USE_TF": "0",
        }  # fmt: skip
        # One process trains on one GPU. With several in sight transformers would choose DataParallel, which TRL refuses
        ours["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        if not self.settings.trainer_allow_hub:
            ours |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        return kept | ours
