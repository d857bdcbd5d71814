"""The parent of a local stack: when it, the supervisor or the owner is killed, nothing of the stack is left behind.

Run as a script by the bare interpreter (`python -I -S keeper.py …`), so it imports the standard library only.

`keep OWNER -- COMMAND`: runs supervisord as a child and, being a subreaper, adopts whatever a killed service leaves
(vLLM's engine processes, a trainer's children) and ends it. When supervisord dies, everything below is ended. When
OWNER (a pid; 0 for none) is no longer the parent, the stack is stopped.

`bind -- COMMAND`: becomes COMMAND, with SIGTERM asked for when the parent dies, as not every program asks itself.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
POLL_SECONDS = 0.5
ORPHAN_PATIENCE_SECONDS = 2.0
"""An orphan usually notices by itself (a closed pipe, its own parent-death signal); after this it gets SIGTERM."""
ORPHAN_GRACE_SECONDS = 10.0
"""From being seen to SIGKILL, for orphans and for everything once the supervisor is gone."""
STOP_SECONDS = 60.0
"""supervisord itself kills after each program's stopwaitsecs; if it has not ended by then, it is killed too."""
WATCHED = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def prctl(option: int, value: int) -> None:
    """Linux only; elsewhere the stack still stops in order, but a kill -9 can leave orphans."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def become(command: list[str], parent: int) -> None:
    """Replace this process by a command that dies with its parent. Returns never."""
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the kernel was asked
        os._exit(143)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]} cannot be started: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)


def parents() -> dict[int, int]:
    """Parent of every living (not zombie) process."""
    found: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    state, parent = file.read().rpartition(b")")[2].split()[:2]
            except OSError:
                continue
            if state not in (b"Z", b"X"):
                found[int(name)] = int(parent)
    return found


def descendants(root: int) -> set[int]:
    """Every process below one, not the process itself."""
    below: set[int] = set()
    links = parents()
    frontier = {root}
    while frontier:
        frontier = {pid for pid, parent in links.items() if parent in frontier} - below
        below |= frontier
    return below


def send(pid: int, number: int) -> None:
    """A signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def reap() -> dict[int, int]:
    """Exit status of every child that ended."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = status


def end_everything() -> None:
    """End all descendants: SIGTERM, then SIGKILL until none is left."""
    deadline = time.monotonic() + ORPHAN_GRACE_SECONDS
    told: set[int] = set()
    while True:
        reap()
        left = descendants(os.getpid())
        if not left:
            return
        for pid in left:
            if time.monotonic() > deadline:
                send(pid, signal.SIGKILL)
            elif pid not in told:
                send(pid, signal.SIGTERM)
        told |= left
        signal.sigtimedwait({signal.SIGCHLD}, 0.1)


def keep(owner: int, command: list[str]) -> int:
    """Run the supervisor until it ends. Returns its exit code (128 + n when signal n ended it)."""
    if owner and os.getppid() != owner:
        return 143
    me = os.getpid()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    supervisor = os.fork()
    if supervisor == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
        become(command, me)
    stop_at = 0.0
    seen: dict[int, float] = {}
    while True:
        info = signal.sigtimedwait(WATCHED, POLL_SECONDS)
        ended = reap()
        if supervisor in ended:
            end_everything()
            return os.waitstatus_to_exitcode(ended[supervisor]) % 256
        now = time.monotonic()
        asked = info is not None and info.si_signo != signal.SIGCHLD
        if not stop_at and (asked or (owner and os.getppid() != owner)):
            stop_at = now + STOP_SECONDS
            send(supervisor, signal.SIGTERM)
        elif stop_at and now > stop_at:
            send(supervisor, signal.SIGKILL)
        orphans = {pid for pid, parent in parents().items() if parent == me} - {supervisor}
        seen = {pid: seen.get(pid, now) for pid in orphans}
        for pid, since in seen.items():
            if now - since > ORPHAN_GRACE_SECONDS:
                send(pid, signal.SIGKILL)
            elif now - since > ORPHAN_PATIENCE_SECONDS:
                send(pid, signal.SIGTERM)


if __name__ == "__main__":
    mode, *rest = sys.argv[1:]
    split = rest.index("--")
    if mode == "bind":
        become(rest[split + 1 :], os.getppid())
    raise SystemExit(keep(int(rest[0]), rest[split + 1 :]))
