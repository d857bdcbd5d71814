"""A whole Ratchet on one machine: Redis and the services as supervised processes.

    from ratchet.local.stack import LocalStack, StackSettings

    with LocalStack(".ratchet", StackSettings(environment={"RATCHET_GENERATOR_DTYPE": "float32"})) as stack:
        stack.wait_ready(deadline_seconds=180)         # entered: started; left: stopped, with nothing left behind
        with stack.client() as client:                 # ratchet.client.RatchetClient
            client.policy()
        stack.processes()                              # memory of each process tree (PSS), for sampling
        stack.restart("generator")

`start()` gives the stack's record (URLs, pids); `status()` what each process does now; `stop()` ends everything and
raises if something is left. `LocalStack.attach(folder)` takes hold of one that runs already (`ratchet up -d`).
Not entered as a context manager and `detached=False`: the stack also ends when the process that started it does.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ratchet.local import processes as system
from ratchet.local.health import ProcessStatus, observe, ping_redis
from ratchet.local.processes import STACK_ID_VARIABLE, ProcessUsage
from ratchet.local.records import REDIS, ProcessRecord, StackFolder, StackRecord
from ratchet.local.settings import StackSettings, service_root
from ratchet.local.supervision import (
    KEEPER,
    MAX_SOCKET_PATH,
    STOP_WAIT_SECONDS,
    Death,
    Program,
    ProgramState,
    Supervisor,
    configuration,
    deaths,
    last_lines,
)  # fmt: skip
from services.contracts.errors import Conflict, DeadlineExceeded, JobFailed, NotFound, Unavailable
from services.platform.urls import without_password

if TYPE_CHECKING:
    from ratchet.client import RatchetClient

SUPERVISOR_START_SECONDS = 20.0
READY_SECONDS = 180.0
"""Importing torch and vLLM on two busy cores takes most of a minute."""
STOP_SECONDS = STOP_WAIT_SECONDS + 15.0
"""All services stop at once; then Redis. After this everything left is killed."""
ORPHAN_SECONDS = 12.0
"""The same for a stack whose keeper was killed."""
LOG_LINES = 15


class LocalStack:
    """One local stack, known by its folder.

    Args:
        folder: Where its state lives (`stack.json`, `token`, `logs/`, `redis/`, `store/`).
        settings: What to start; not needed to attach.
    """

    def __init__(self, folder: str | Path = ".ratchet", settings: StackSettings | None = None) -> None:
        self.files = StackFolder(folder)
        self.settings = settings or StackSettings()
        self._record: StackRecord | None = None
        self._keeper: subprocess.Popen[bytes] | None = None
        self.released = False

    @classmethod
    def attach(cls, folder: str | Path = ".ratchet") -> LocalStack:
        """The stack that runs in a folder. Raises NotFound when none does."""
        stack = cls(folder)
        record = stack.files.read()
        if record is None or not stack.files.running:
            raise NotFound(f"no stack is running in {stack.files.path}; start one with 'ratchet up', or give --dir")
        stack._record = record
        return stack

    @property
    def record(self) -> StackRecord:
        """What `start` wrote to `stack.json`."""
        if self._record is None:
            raise NotFound(f"the stack in {self.files.path} is not started; call start()")
        return self._record

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self, *, detached: bool = False) -> StackRecord:
        """Start Redis and the services; returns once they are launched (see `wait_ready`).

        Raises:
            Conflict: a stack runs here already, or a given port is in use. Nothing was started.
            InvalidInput: a setting is wrong or would do nothing.
            Unavailable: REDIS_URL does not answer, there is no Redis server, or supervisord does not start.
        """
        self.settings.check()
        self.files.make()
        lock = self.files.lock()
        if lock is None:
            running = self.files.read()
            where = running.url("orchestrator") if running else None
            raise Conflict(
                f"a stack is running in {self.files.path}{f' ({where})' if where else ''}. "
                f"Stop it with 'ratchet down', or give another --dir"
            )
        try:
            return self._launch(lock, detached=detached)
        finally:
            os.close(lock)  # the keeper and supervisord hold it on

    def _launch(self, lock: int, *, detached: bool) -> StackRecord:
        if stale := self.files.read():
            system.kill_members(stale.id)
            self._forget(stale)
        outside = os.environ.get("REDIS_URL")
        if outside and (problem := ping_redis(outside)):
            raise Unavailable(
                f"REDIS_URL is {without_password(outside)}, and that server does not answer: {problem}. Start it, or "
                "unset REDIS_URL: then the stack runs a Redis of its own",
                field="REDIS_URL",
            )
        names = [*([] if outside else [REDIS]), *self.settings.services]
        ports = system.choose_ports(self.settings.host, names, self.settings.ports)
        token = self.files.token()
        redis_url = outside or f"redis://127.0.0.1:{ports[REDIS]}/0"
        store = self.settings.store or str(self.files.path / "store")
        store = store if "://" in store else str(Path(store).absolute())
        stack_id = uuid.uuid4().hex
        records = tuple(
            ProcessRecord(
                name=name, port=ports[name], log=str(self.files.logs / f"{name}.log"),
                url=redis_url if name == REDIS else f"http://{self.settings.host}:{ports[name]}",
            )
            for name in names
        )  # fmt: skip
        socket_path = self._socket_path()
        config = self.files.supervisor / "supervisord.conf"
        config.write_text(
            configuration([self._program(r, index) for index, r in enumerate(records)],
                          socket_path=socket_path, folder=self.files.supervisor)
        )  # fmt: skip
        for old in self.files.supervisor.glob("supervisord.log*"):
            old.unlink()  # deaths are counted from it, and those of an earlier stack are not ours
        environment = {
            # Services share the cores: OpenMP threads that spin while they wait would slow the others down manifold.
            "OMP_WAIT_POLICY": "passive",
            # One's own machine: a hub name given to `ratchet run` is meant. Containers have to be told.
            "RATCHET_TRAINER_ALLOW_HUB": "true",
            **os.environ,
            **self.settings.environment,
            STACK_ID_VARIABLE: stack_id,
            "RATCHET_TOKEN": token,
            "RATCHET_STORE_URL": store,
            "RATCHET_REDIS_URL": redis_url,
            "RATCHET_HOST": self.settings.host,
            **{f"RATCHET_{r.name.upper()}_URL": r.url or "" for r in records if r.name != REDIS},
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(service_root()), os.environ.get("PYTHONPATH")])),
        }
        with open(self.files.supervisor / "keeper.log", "wb") as output:
            keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", str(KEEPER), "keep", "0" if detached else str(os.getpid()), "--",
                 sys.executable, "-m", "supervisor.supervisord", "-c", str(config)],
                env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=(lock,),
                start_new_session=True,  # Ctrl-C goes to us, and we stop the stack in order
            )  # fmt: skip
        self._keeper = keeper
        self._record = StackRecord(
            id=stack_id, folder=str(self.files.path), started_at=time.time(), detached=detached, keeper_pid=keeper.pid,
            supervisor_socket=str(socket_path), store_url=store, redis_url=redis_url, redis_managed=not outside,
            processes=records,
        )  # fmt: skip
        self.files.write(self._record)
        try:
            states = self._supervisor_answers()
        except BaseException:
            self.stop()
            raise
        self._write_pids(states)
        return self._record

    def wait_ready(
        self,
        deadline_seconds: float = READY_SECONDS,
        *,
        only: Iterable[str] | None = None,
        on_status: Callable[[tuple[ProcessStatus, ...]], None] | None = None,
    ) -> tuple[ProcessStatus, ...]:
        """Wait until every process (or those in `only`) serves, or waits only for a model to be given.

        Raises:
            JobFailed: a process failed to start too often; with how it died and its last log lines.
            DeadlineExceeded: names what was not ready and what it said last.
            Unavailable: the stack was stopped meanwhile.
        """
        names = set(only or (process.name for process in self.record.processes))
        deadline = time.monotonic() + deadline_seconds
        while True:
            statuses = self.status()
            if on_status:
                on_status(statuses)
            wanted = [status for status in statuses if status.name in names]
            if failed := next((status for status in wanted if status.state == "failed"), None):
                raise JobFailed(self.failure(failed))
            if all(status.up for status in wanted):
                return statuses
            if not self.files.running:
                raise Unavailable(f"the stack in {self.files.path} was stopped while it was waited for")
            if time.monotonic() > deadline:
                late = "; ".join(
                    f"{status.name} is {status.state}: {status.detail}" for status in wanted if not status.up
                )
                raise DeadlineExceeded(f"not ready after {deadline_seconds:g} s: {late}. Logs: {self.files.logs}")
            time.sleep(0.25)

    def stop(self) -> None:
        """Stop everything, wait until it has ended, and verify that no process and no port is left. Idempotent.

        Raises:
            Unavailable: something survived even SIGKILL (named).
        """
        record = self._record or self.files.read()
        if record is None:
            return
        keeper = next((p for p in system.members(record.id) if p.pid == record.keeper_pid), None)
        if keeper is not None:
            keeper.send_signal(signal.SIGTERM)
        else:  # it was killed; what it held is ending by itself, or is told here
            for process in system.members(record.id):
                process.terminate()
        deadline = time.monotonic() + (STOP_SECONDS if keeper is not None else ORPHAN_SECONDS)
        while (
            self._running_keeper() or system.members(record.id) or self.files.running
        ) and time.monotonic() < deadline:
            time.sleep(0.1)
        left = [str(process) for process in system.kill_members(record.id)]
        self._running_keeper()
        # Redis rewrites its environment (its title is there), so it is known by its port.
        left += [
            f"port {process.port} of {process.name} is still held"
            for process in record.processes
            if process.port and system.listens(self.settings.host, process.port)
        ]
        if left:
            raise Unavailable(f"the stack in {record.folder} could not be ended wholly: {'; '.join(left)}")
        self._forget(record)
        self._record = None

    def release(self) -> None:
        """Let a detached stack go on without us: leaving a `with` block does not stop it any more."""
        self.released = True

    def restart(self, name: str) -> None:
        """Stop one process in order and start it again; `wait_ready(only=[name])` waits for it."""
        self.record.process(name)
        self._supervisor().restart(name)

    # -- what it is doing ---------------------------------------------------------------------------------------------

    def status(self) -> tuple[ProcessStatus, ...]:
        """What each process does now, Redis first."""
        try:
            states = self._supervisor().states()
        except Unavailable:
            states: dict[str, ProgramState] = {}
        died = self.deaths()
        records = self.record.processes
        with ThreadPoolExecutor(len(records)) as pool:
            return tuple(
                pool.map(lambda r: observe(r, states.get(r.name), tuple(d for d in died if d.name == r.name)), records)
            )

    def deaths(self) -> list[Death]:
        """Every process that ended unasked since the stack was started, in order."""
        return deaths(self.files.supervisor_log)

    def failure(self, status: ProcessStatus) -> str:
        """What a dead process's status and last log lines say, as one text."""
        log = self.record.process(status.name).log
        lines = last_lines(Path(log), LOG_LINES)
        said = "\n".join(f"  | {line}" for line in lines) or "  | (nothing)"
        return f"{status.name} died ({status.detail}). The last lines of {log}:\n{said}"

    def processes(self) -> tuple[ProcessUsage, ...]:
        """Memory of each supervised process, with everything below it (vLLM's engine, a training job)."""
        found = (system.usage(s.name, s.pid) for s in self._supervisor().states().values() if s.pid)
        return tuple(usage for usage in found if usage)

    def client(self) -> RatchetClient:
        """A client for this stack."""
        from ratchet.client import RatchetClient

        return RatchetClient.from_stack(self.files.path)

    # -- inner --------------------------------------------------------------------------------------------------------

    def _program(self, record: ProcessRecord, index: int) -> Program:
        if record.name == REDIS:
            from ratchet.local.redis_server import find_redis, redis_command  # brings FastAPI

            assert record.port
            folder = self.files.path / "redis"
            folder.mkdir(exist_ok=True)
            command = redis_command(find_redis(), record.port, folder)
            return Program(REDIS, tuple(command), {}, Path(record.log), priority=0)
        command = self.settings.commands.get(record.name) or (sys.executable, "-m", f"services.{record.name}")
        return Program(record.name, command, {"RATCHET_PORT": str(record.port)}, Path(record.log), priority=10 + index)

    def _socket_path(self) -> Path:
        path = self.files.supervisor / "supervisor.sock"
        path.unlink(missing_ok=True)
        # supervisord binds `<path>.<pid>` first and renames it
        if len(os.fsencode(path)) + len(".4194304") <= MAX_SOCKET_PATH:
            return path
        return Path(tempfile.mkdtemp(prefix="ratchet-")) / "s.sock"

    def _forget(self, record: StackRecord) -> None:
        self.files.record_file.unlink(missing_ok=True)
        socket_path = Path(record.supervisor_socket)
        socket_path.unlink(missing_ok=True)
        if socket_path.parent != self.files.supervisor and socket_path.parent.name.startswith("ratchet-"):
            shutil.rmtree(socket_path.parent, ignore_errors=True)

    def _supervisor(self) -> Supervisor:
        return Supervisor(self.record.supervisor_socket)

    def _supervisor_answers(self) -> dict[str, ProgramState]:
        deadline = time.monotonic() + SUPERVISOR_START_SECONDS
        while True:
            try:
                return self._supervisor().states()
            except Unavailable as error:
                if not self._running_keeper() or time.monotonic() > deadline:
                    lines = last_lines(self.files.supervisor / "keeper.log", LOG_LINES)
                    raise Unavailable(f"supervisord did not start: {' / '.join(lines) or error.detail}") from error
            time.sleep(0.05)

    def _write_pids(self, states: dict[str, ProgramState]) -> None:
        record = self.record
        known = tuple(p.model_copy(update={"pid": states[p.name].pid}) for p in record.processes)
        self._record = record.model_copy(update={"processes": known})
        self.files.write(self._record)

    def _running_keeper(self) -> bool:
        """Whether our own child keeper lives; reaps it when it does not."""
        return self._keeper is not None and self._keeper.poll() is None

    def __enter__(self) -> Self:
        if self._record is None:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
