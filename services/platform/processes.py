"""Child processes that do not outlive their parent. Apart from `platform.service`: they need no FastAPI."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel for SIGTERM when the parent dies, so that a killed supervisor leaves no orphan. Linux only.

    Args:
        parent: Process id that the parent told the child. Without it a parent that died before this call is not missed.
    """
    if sys.platform == "linux":
        parent = parent or os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
