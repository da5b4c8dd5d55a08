"""Ending runs that are queued or at work, so that the same command goes on with them later."""

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

_PATIENCE_SECONDS = 60.0  # for the step that a run is in, and for SLURM, which waits 30 s before it kills
_POLL_SECONDS = 0.2
_ASK_SLURM_SECONDS = 1.0


def cancel(folders: Sequence[RunFolder]) -> int:
    """Have runs save and end: SLURM's by ``scancel``, this machine's by a signal. Says of each how that went.

    Returns:
        0 when none is at work any more, 1 when one still is.

    Raises:
        UserError: when SLURM refuses, or doesn't answer.
    """
    statuses = {folder: folder.read_status() for folder in folders}
    queued = {str(job) for job, at in jobs_of(statuses.values()).items() if not at.ended}
    of_slurm = {f: str(s["job_id"]) for f, s in statuses.items() if str(s.get("job_id")) in queued}
    here = [
        folder
        for folder in folders
        if folder not in of_slurm and folder.is_held() and _is_here(folder, statuses[folder])
    ]
    if of_slurm:
        answer = ask("scancel", *of_slurm.values())
        if answer.returncode != 0:
            raise UserError(f"scancel: {answer.stderr.strip()}")
    for folder in here:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(statuses[folder]["pid"], signal.SIGTERM)
    until = time.monotonic() + _PATIENCE_SECONDS
    left = _wait_for_jobs(of_slurm, until) + _wait_for_locks([*of_slurm, *here], until)
    for folder in folders:
        asked = folder in of_slurm or folder in here
        print(f"{folder.name}: {_outcome(folder, asked=asked, at_work=folder in left)}", flush=True)
    elsewhere = any(folder not in of_slurm and folder not in here and folder.is_held() for folder in folders)
    return 1 if left or elsewhere else 0


def _is_here(folder: RunFolder, status: dict[str, Any]) -> bool:
    """Whether the worker is this machine's: the process of the status, unless that has ended and left its number."""
    if status.get("host") != socket.gethostname() or "pid" not in status:
        return False
    try:
        return folder.name in Path(f"/proc/{status['pid']}/cmdline").read_text()
    except OSError:
        return False


def _wait_for_jobs(jobs: dict[RunFolder, str], until: float) -> list[RunFolder]:
    """The runs whose jobs go on for all that."""
    while jobs:
        states = slurm_states(jobs.values())
        jobs = {folder: job for folder, job in jobs.items() if job in states and not states[job].ended}
        if time.monotonic() > until:
            break
        time.sleep(_ASK_SLURM_SECONDS if jobs else 0)
    return list(jobs)


def _wait_for_locks(folders: list[RunFolder], until: float) -> list[RunFolder]:
    while (held := [folder for folder in folders if folder.is_held()]) and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
    return held


def _outcome(folder: RunFolder, *, asked: bool, at_work: bool) -> str:
    """What became of a run, in words. One that never began, or was killed, gets a state that says so."""
    if not asked:
        return f"not at work here: {folder.held_by()}" if folder.is_held() else f"not at work; {folder.state()}"
    if at_work:
        return f"still at work after {_PATIENCE_SECONDS:.0f} s; it ends after its step"
    with contextlib.suppress(RunBusyError), folder.hold():
        if folder.state() in ("queued", "running", "preempted"):
            folder.update_status(state="preempted", message=f"cancelled; {RESUMES}", ended=time.time())
    status = folder.read_status()
    step = f" after step {status['step']} of {status['steps']}" if status.get("steps") else ", it hadn't begun"
    return f"cancelled{step}" if status["state"] == "preempted" else f"had {status['state']}"
