"""Runs one command and never lets its processes outlive ours: `python -I launcher.py <command> …`.

vLLM is a tree of processes, and the grandchildren do not die with the gateway. This small process leads a process
group of its own, holds the read end of a pipe (stdin) whose write end only the gateway has, and kills the whole group
when the pipe ends (the gateway died, however), when it is told to stop, or when the command ends.

Standard library only: it must start in milliseconds, and in any environment vLLM runs in.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
STOP_SECONDS = 20.0
"""The gateway kills the group itself long before this; it only bounds a stop without a gateway."""


def die_with_launcher() -> None:
    """In the child: SIGKILL when the launcher dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run(command: list[str]) -> None:
    """Run the command until it ends, the pipe ends, or SIGTERM comes."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    # preexec_fn is safe here: this process has one thread
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_launcher)  # noqa: PLW1509
    stopping = False
    while child.poll() is None:
        readable, _, _ = select.select([wake_read, 0], [], [], STOP_SECONDS)
        if 0 in readable and not os.read(0, 4096):
            break  # the gateway is gone: nobody waits for a polite end
        if stopping and not readable:
            break
        if wake_read in readable:
            stop = set(os.read(wake_read, 512)) & {signal.SIGTERM, signal.SIGINT}
            if stop and not stopping:
                stopping = True
                child.terminate()


if __name__ == "__main__":
    try:
        run(sys.argv[1:])
    finally:
        # Nothing may come between: with the gateway gone even a print fails. The group dies, we with it.
        os.killpg(0, signal.SIGKILL)
