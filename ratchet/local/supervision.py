"""supervisord: its configuration, its RPC over a unix socket, and what its log says about processes that died."""

from __future__ import annotations

import http.client
import re
import shlex
import socket
import sys
import xmlrpc.client
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from services.contracts.errors import Unavailable

KEEPER = Path(__file__).with_name("keeper.py")
QUICK_DEATH_SECONDS = 20
"""A process that dies sooner after its start counts as failing to start; importing torch alone takes 10 s."""
START_RETRIES = 3
"""Failed starts in a row (1, 2, 3 s apart) before supervisord gives up and the process is `failed`."""
STOP_WAIT_SECONDS = 25
"""SIGTERM to SIGKILL: a service gives open connections 10 s, and the generator then stops its engine."""
LOG_BYTES = 20 * 1024 * 1024
LOG_BACKUPS = 3
RPC_SECONDS = 40.0
"""Longer than STOP_WAIT_SECONDS: stopping a process answers when it has ended."""
MAX_SOCKET_PATH = 107
"""Bytes in sockaddr_un.sun_path, without the closing zero."""


@dataclass(frozen=True)
class Program:
    """One process to supervise."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    priority: int


@dataclass(frozen=True)
class ProgramState:
    """What supervisord says about a process."""

    name: str
    state: str
    pid: int | None
    started_at: float
    spawn_error: str


@dataclass(frozen=True)
class Death:
    """A process ended that should not have."""

    name: str
    at: float
    how: str
    """As supervisord says it: `exit status 3`, `terminated by SIGKILL`."""


def configuration(programs: Sequence[Program], *, socket_path: Path, folder: Path) -> str:
    """The text of supervisord.conf. Secrets are not in it: programs inherit supervisord's environment."""
    sections = [
        f"[unix_http_server]\nfile={_escape(str(socket_path))}\nchmod=0700\n",
        "[rpcinterface:supervisor]\nsupervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface\n",
        f"[supervisord]\nnodaemon=true\nsilent=true\nloglevel=info\n"
        f"logfile={_escape(str(folder / 'supervisord.log'))}\n"
        f"logfile_maxbytes=10MB\nlogfile_backups=1\npidfile={_escape(str(folder / 'supervisord.pid'))}\n"
        f"childlogdir={_escape(str(folder))}\n",
    ]
    for program in programs:
        command = shlex.join([sys.executable, "-I", "-S", str(KEEPER), "bind", "--", *program.command])
        environment = ",".join(f'{key}="{_escape(value)}"' for key, value in program.environment.items())
        sections.append(
            f"[program:{program.name}]\ncommand={_escape(command)}\nenvironment={environment}\n"
            f"priority={program.priority}\nautorestart=true\nstartsecs={QUICK_DEATH_SECONDS}\nstartretries={START_RETRIES}\n"
            f"stopwaitsecs={STOP_WAIT_SECONDS}\nstopasgroup=true\nkillasgroup=true\nredirect_stderr=true\n"
            f"stdout_logfile={_escape(str(program.log))}\nstdout_logfile_maxbytes={LOG_BYTES}\n"
            f"stdout_logfile_backups={LOG_BACKUPS}\n"
        )
    return "\n".join(sections)


def _escape(value: str) -> str:
    """supervisord expands `%(name)s` in every value."""
    return value.replace("%", "%%")


class Supervisor:
    """The calls of supervisord's XML-RPC interface that a stack needs."""

    def __init__(self, socket_path: str) -> None:
        self._socket = socket_path

    def states(self) -> dict[str, ProgramState]:
        """State of each process by name. Raises Unavailable when supervisord does not answer."""
        infos: list[dict[str, Any]] = self._call("getAllProcessInfo")
        return {
            info["name"]: ProgramState(
                name=info["name"], state=info["statename"], pid=info["pid"] or None,
                started_at=float(info["start"]), spawn_error=info["spawnerr"],
            )
            for info in infos
        }  # fmt: skip

    def restart(self, name: str) -> None:
        """Stop a process in order and start it again, without waiting for QUICK_DEATH_SECONDS."""
        state = self.states()[name].state
        if state in ("RUNNING", "STARTING"):
            self._call("stopProcess", name, True)
        elif state == "BACKOFF":  # stopping it makes the retry counter start anew
            self._call("stopProcess", name, False)
        self._call("startProcess", name, False)

    def _call(self, method: str, *arguments: Any) -> Any:
        transport = _UnixTransport(self._socket)
        proxy: Any = xmlrpc.client.ServerProxy("http://supervisor", transport=transport)
        try:
            return getattr(proxy.supervisor, method)(*arguments)
        except xmlrpc.client.Fault as fault:
            raise Unavailable(f"supervisord refused {method} {arguments}: {fault.faultString}") from fault
        except (OSError, http.client.HTTPException, xmlrpc.client.ProtocolError) as error:
            raise Unavailable(f"supervisord does not answer at {self._socket}: {error}") from error
        finally:
            transport.close()


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=RPC_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(RPC_SECONDS)
        self.sock.connect(self._path)


class _UnixTransport(xmlrpc.client.Transport):
    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        return _UnixConnection(self._path)


_DIED = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) \w+ exited: (\S+) \((.*); (?:not )?expected\)$")


def deaths(log: Path) -> list[Death]:
    """Every unasked-for end of a process in supervisord's log, in order. Requested stops are not among them."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return []
    found: list[Death] = []
    for line in text.splitlines():
        if match := _DIED.match(line):
            at = datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S").astimezone().timestamp() + int(match[2]) / 1000
            found.append(Death(name=match[3], at=at, how=match[4]))
    return found


def last_lines(file: Path, count: int) -> list[str]:
    """The last lines of a log, without reading all of it."""
    try:
        with file.open("rb") as handle:
            handle.seek(0, 2)
            handle.seek(max(0, handle.tell() - 64 * 1024))
            lines = handle.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return lines[-count:]
