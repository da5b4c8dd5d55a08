"""Processes that end with their parent (on Linux; elsewhere the parent only signals them)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

LAUNCHER_PID = "LARGEBATCH_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Make the kernel kill this process when its parent ends for any reason."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def seconds_alive() -> float:
    """Return the seconds since this process started; elsewhere than on Linux, its CPU seconds."""
    if sys.platform != "linux":
        return time.process_time()
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def launcher_is_gone() -> bool:
    """Return True if this worker's launcher, or the torchrun between them, ended before ``die_with_parent``."""
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is None:  # started by hand
        return False
    try:
        os.kill(int(launcher), 0)
    except ProcessLookupError:
        return True
    parent = os.getppid()
    if not Path("/proc/self").exists():  # not on Linux
        return False
    if "TORCHELASTIC_RUN_ID" in os.environ and parent != int(launcher):
        try:
            parent = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
        except FileNotFoundError:  # torchrun has just ended
            return True
    return parent != int(launcher)
