"""``largebatch cancel``: runs save and stop, on SLURM or on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from largebatch.errors import UserError
from largebatch.runs.folder import RESUMES, RunBusyError, RunFolder
from largebatch.runs.slurm_queue import ask, jobs_of, slurm_states
from largebatch.terminal import printable

_PATIENCE_SECONDS = 60.0  # a run finishes its step, and SLURM waits 30 s before it kills
_POLL_SECONDS = 0.2
_ASK_SLURM_SECONDS = 1.0


def cancel(folders: Sequence[RunFolder]) -> int:
    """Stop runs after they have saved, SLURM's by ``scancel`` and this machine's by SIGTERM. Print each outcome.

    Returns:
        0 if no run is running any more, else 1. A folder without a readable status counts as running.

    Raises:
        UserError: SLURM refuses or doesn't answer.
    """
    statuses, unreadable = {}, False
    for folder in folders:
        try:
            statuses[folder] = folder.read_status()
        except UserError as error:
            print(printable(f"{folder.name}: {error}"), flush=True)
            unreadable = True
    queued = {str(job) for job, at in jobs_of(statuses.values()).items() if not at.ended}
    of_slurm = {f: str(s["job_id"]) for f, s in statuses.items() if str(s.get("job_id")) in queued}
    here = [f for f, s in statuses.items() if f not in of_slurm and f.is_held() and _is_here(f, s)]
    if of_slurm:
        answer = ask("scancel", *of_slurm.values())
        if answer.returncode != 0:
            raise UserError(f"scancel: {answer.stderr.strip()}")
    for folder in list(here):
        try:
            os.kill(statuses[folder]["pid"], signal.SIGTERM)
        except ProcessLookupError:  # it has just ended
            pass
        except PermissionError:  # it is another user's
            here.remove(folder)
    left = _wait([*of_slurm, *here], of_slurm)
    elsewhere = False
    for folder in statuses:
        if folder in of_slurm or folder in here:
            outcome = _outcome(folder, is_running=folder in left)
        elif folder.is_held():
            outcome, elsewhere = f"not cancelled: {folder.held_by()}", True
        else:
            state = folder.state()
            outcome = f"not running; {'interrupted' if state == 'running' else state}"
        if not os.access(folder.path, os.W_OK):
            outcome += "; the folder is another user's, or read-only"
        print(printable(f"{folder.name}: {outcome}"), flush=True)
    return 1 if left or elsewhere or unreadable else 0


def _is_here(folder: RunFolder, status: dict[str, Any]) -> bool:
    """Return True if the status names a process of this machine that still runs it."""
    if status.get("host") != socket.gethostname() or "pid" not in status:
        return False
    try:
        return folder.name in Path(f"/proc/{status['pid']}/cmdline").read_text()
    except OSError:
        return False


def _wait(folders: list[RunFolder], jobs: dict[RunFolder, str]) -> list[RunFolder]:
    """Wait until the runs' locks are free and their jobs have ended. Return the runs for which the time is up."""
    until = time.monotonic() + _PATIENCE_SECONDS
    while True:
        states = slurm_states(jobs.values())
        in_slurm = [folder for folder, job in jobs.items() if job in states and not states[job].ended]
        left = [folder for folder in folders if folder.is_held() or folder in in_slurm]
        if not left or time.monotonic() >= until:
            return left
        time.sleep(_ASK_SLURM_SECONDS if jobs else _POLL_SECONDS)


def _outcome(folder: RunFolder, *, is_running: bool) -> str:
    """Describe a cancelled run. The state of a run that never started, or was killed, becomes ``preempted``."""
    if is_running:
        return f"still running after {_PATIENCE_SECONDS:.0f} s; it stops after its step"
    with contextlib.suppress(RunBusyError), folder.hold():
        if folder.state() in ("queued", "running", "preempted"):
            folder.update_status(state="preempted", message=f"cancelled; {RESUMES}", ended=time.time())
    status = folder.read_status()
    step = f" after step {status['step']} of {status['steps']}" if status.get("steps") else " before it started"
    return f"cancelled{step}" if status["state"] == "preempted" else f"had {status['state']}"
