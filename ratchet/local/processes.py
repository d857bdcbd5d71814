"""The operating system's view of a stack: process trees, memory, ports, and what may have been left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import psutil

from services.contracts.errors import Conflict, InvalidInput

STACK_ID_VARIABLE = "RATCHET_STACK_ID"


@dataclass(frozen=True)
class ProcessUsage:
    """One supervised process with everything below it."""

    name: str
    pid: int
    pids: tuple[int, ...]
    pss_bytes: int
    """Proportional set size of the whole tree: memory shared by k processes counts 1/k in each."""


def usage(name: str, pid: int) -> ProcessUsage | None:
    """Memory of a process tree, None when it is gone."""
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return None
    return ProcessUsage(name, pid, tuple(p.pid for p in tree), sum(_pss(p) for p in tree))


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.AccessDenied:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def members(stack_id: str) -> list[psutil.Process]:
    """Every living process that was started by a stack, however it was orphaned: known by its environment."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(STACK_ID_VARIABLE) == stack_id:
                found.append(process)
    return [process for process in found if process.pid != os.getpid()]


def kill_members(stack_id: str, within_seconds: float = 5.0) -> list[psutil.Process]:
    """SIGKILL whatever a stack left behind. Returns what even that did not end."""
    deadline = time.monotonic() + within_seconds
    while left := members(stack_id):
        if time.monotonic() > deadline:
            return left
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(left, timeout=0.5)
    return []


def listens(host: str, port: int) -> bool:
    """Whether somebody holds a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def choose_ports(host: str, names: Iterable[str], given: Mapping[str, int]) -> dict[str, int]:
    """A free port for each process: the given one, or any.

    Raises:
        Conflict: a given port is in use; says by whom where that can be seen.
        InvalidInput: two processes are given the same port.
    """
    names = list(names)
    taken: dict[int, str] = {}
    for name in names:
        if port := given.get(name):
            if port in taken:
                raise InvalidInput(f"{taken[port]} and {name} are both given port {port}", field=f"{name}-port")
            if listens(host, port):
                raise Conflict(
                    f"port {port} for {name} is in use{_holder(port)}. Nothing was started. "
                    f"Stop it, or give another --{name}-port (without one, a free port is taken)",
                    field=f"{name}-port",
                )
            taken[port] = name
    chosen = {name: port for port, name in taken.items()}
    held: list[socket.socket] = []  # kept open until all are chosen, so that no two are the same
    try:
        for name in names:
            if name not in chosen:
                probe = socket.socket()
                held.append(probe)
                probe.bind((host, 0))
                chosen[name] = int(probe.getsockname()[1])
    finally:
        for probe in held:
            probe.close()
    return chosen


def _holder(port: int) -> str:
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
                if connection.pid is None:
                    break
                return f" by pid {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error:
        pass
    return ""
