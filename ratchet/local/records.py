"""What is written about a local stack (`stack.json`, `token`), and the lock that says whether one is running."""

from __future__ import annotations

import fcntl
import os
import secrets
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from services.contracts.errors import InvalidInput, NotFound
from services.contracts.model import Contract
from services.platform.settings import MIN_TOKEN_CHARACTERS

SERVICES = ("generator", "reward", "trainer", "orchestrator")
REDIS = "redis"
ServiceName = Literal["generator", "reward", "trainer", "orchestrator"]


class ProcessRecord(Contract):
    """One supervised process, as it was started."""

    name: str
    port: int | None = None
    url: str | None = Field(default=None, description="Where it answers; Redis: its redis:// URL.")
    pid: int | None = Field(default=None, description="When the stack came up; `ratchet status` shows the present one.")
    log: str


class StackRecord(Contract):
    """`stack.json`: where a local stack runs. It exists while the stack does."""

    schema_version: Literal[1] = 1
    id: str = Field(description="Also RATCHET_STACK_ID in the environment of every process of the stack.")
    folder: str
    started_at: float = Field(description="Seconds since the epoch.")
    detached: bool
    keeper_pid: int
    supervisor_socket: str
    store_url: str
    redis_url: str
    redis_managed: bool = Field(description="False: REDIS_URL was given, and `ratchet down` leaves that server alone.")
    processes: tuple[ProcessRecord, ...]

    def process(self, name: str) -> ProcessRecord:
        """A process by its name. Raises NotFound, naming those there are."""
        for process in self.processes:
            if process.name == name:
                return process
        raise NotFound(
            f"the stack in {self.folder} has no process {name!r}; it runs {', '.join(p.name for p in self.processes)}",
            field="service",
        )

    def url(self, name: str) -> str | None:
        """URL of a service, None when this stack does not run it."""
        return next((process.url for process in self.processes if process.name == name), None)


class StackFolder:
    """The files of a stack's folder (`.ratchet`)."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder).absolute()
        self.record_file = self.path / "stack.json"
        self.token_file = self.path / "token"
        self.lock_file = self.path / "lock"
        self.logs = self.path / "logs"
        self.supervisor = self.path / "supervisor"
        self.supervisor_log = self.supervisor / "supervisord.log"

    def make(self) -> None:
        """Create the folders; the supervisor's is for its owner only."""
        for folder in (self.path, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        self.supervisor.mkdir(mode=0o700, exist_ok=True)
        self.supervisor.chmod(0o700)

    def read(self) -> StackRecord | None:
        """`stack.json`, None when there is none (or it is from another version, hence useless)."""
        try:
            return StackRecord.model_validate_json(self.record_file.read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValidationError):
            return None

    def write(self, record: StackRecord) -> None:
        """Replace `stack.json` atomically."""
        handle, name = tempfile.mkstemp(prefix=".stack-", dir=self.path)
        with os.fdopen(handle, "w") as file:
            file.write(record.model_dump_json(indent=2) + "\n")
        os.replace(name, self.record_file)

    def token(self) -> str:
        """RATCHET_TOKEN, else the token file's; made when there is none (0600).

        Raises:
            InvalidInput: RATCHET_TOKEN is too short.
        """
        given = os.environ.get("RATCHET_TOKEN")
        if given:
            if len(given) < MIN_TOKEN_CHARACTERS:
                raise InvalidInput(
                    f"RATCHET_TOKEN has {len(given)} characters; it must have at least {MIN_TOKEN_CHARACTERS}. "
                    "Unset it, and 'ratchet up' makes one",
                    field="RATCHET_TOKEN",
                )
            # The client and later commands read the file, whatever their environment.
            if self.saved_token() != given:
                self._save_token(given)
            return given
        saved = self.saved_token()
        if saved and len(saved) >= MIN_TOKEN_CHARACTERS:
            return saved
        made = secrets.token_urlsafe(32)
        self._save_token(made)
        return made

    def saved_token(self) -> str | None:
        """The token file's content."""
        try:
            return self.token_file.read_text().strip() or None
        except OSError:
            return None

    def _save_token(self, token: str) -> None:
        self.token_file.unlink(missing_ok=True)
        handle = os.open(self.token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(token + "\n")

    def lock(self) -> int | None:
        """A descriptor holding the stack's lock, None while a stack (its keeper or supervisor) holds it."""
        handle = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        return handle

    @property
    def running(self) -> bool:
        """Whether a stack runs here. Told by a lock, so a reused pid cannot deceive."""
        if not self.lock_file.exists():
            return False
        handle = self.lock()
        if handle is None:
            return True
        os.close(handle)
        return False
