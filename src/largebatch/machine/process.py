"""Processes that end with their parent (on Linux; elsewhere the parent only signals them)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

LAUNCHER_PID = "LARGEBATCH_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Make the kernel kill this process when its parent ends for any reason."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def launcher_is_gone() -> bool:
    """Return True if this worker's launcher ended before ``die_with_parent`` took effect."""
    pid = os.environ.get(LAUNCHER_PID)
    if pid is None:  # started by hand
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    return False
