"""States of SLURM's jobs, from SLURM's commands; needs neither accounting nor submitit."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from largebatch.errors import UserError

_ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
    "REVOKED", "UNKNOWN",
)  # fmt: skip
_PATIENCE_SECONDS = 20.0
_SUBMITTING_SECONDS = 600.0  # a launcher that hasn't written a job's number by then is dead


@dataclass(frozen=True)
class Job:
    """A job, or an element of an array."""

    state: str  # SLURM's word: PENDING, RUNNING, TIMEOUT, ...
    reason: str = ""  # SLURM's reason for waiting, or for the end

    @property
    def ended(self) -> bool:
        return self.state in _ENDED


Jobs = Mapping[str, Job]  # by their numbers, as 12 or 12_3


def slurm_states(job_ids: Iterable[str]) -> dict[str, Job]:
    """Return the jobs that SLURM knows: one call of ``squeue``, and one of ``sacct`` for the jobs it forgot.

    Args:
        job_ids: as ``12``, or ``12_3`` for an element of an array.

    Raises:
        UserError: SLURM doesn't answer. The message has SLURM's words.
    """
    wanted = set(job_ids)
    if not wanted or shutil.which("squeue") is None:
        return {}
    numbers = ",".join(sorted({job_id.partition("_")[0] for job_id in wanted}))
    queue = ask("squeue", "--noheader", "--array", "--states=all", f"--jobs={numbers}", "--format=%i|%T|%r")
    if queue.returncode and "Invalid job id" not in queue.stderr:
        raise UserError(f"squeue: {queue.stderr.strip()}")
    found = _parse(queue.stdout, wanted)
    if wanted - set(found) and shutil.which("sacct"):
        past = ask("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={numbers}",
                   "--format=JobID,State,ExitCode")  # fmt: skip
        found = _parse(past.stdout, wanted) | found  # without accounting it prints nothing
    return found


def jobs_of(statuses: Iterable[Mapping[str, Any]]) -> dict[str, Job]:
    """Return the jobs of runs without an outcome; a job that SLURM has forgotten is UNKNOWN."""
    job_ids = [str(status["job_id"]) for status in statuses if _is_open(status) and status.get("job_id")]
    if shutil.which("squeue") is None:
        return {}
    return dict.fromkeys(job_ids, Job("UNKNOWN")) | slurm_states(job_ids)


def claim_by_slurm(status: Mapping[str, Any], jobs: Jobs | None = None) -> str:
    """Describe the job that has the run of this ``status``; empty if there is none. ``jobs``: known already."""
    if not _is_open(status):
        return ""
    if not status.get("job_id"):
        fresh = abs(time.time() - status.get("updated", 0)) < _SUBMITTING_SECONDS  # the clock may have been set back
        return "is being submitted to SLURM by another launcher" if fresh and status["state"] == "queued" else ""
    job_id = str(status["job_id"])
    if jobs is None or job_id not in jobs:  # a newer job than the known ones
        jobs = slurm_states([job_id])
    job = jobs.get(job_id)
    return "" if job is None or job.ended else f"is in SLURM's queue already: job {job_id}, {job.state}"


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands.

    Raises:
        UserError: the command doesn't answer, or doesn't exist.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        problem = f"SLURM didn't answer within {_PATIENCE_SECONDS:.0f} s. Fix: try again later"
        raise UserError(f"{command[0]}: {problem}") from None
    except OSError as error:
        raise UserError(f"{command[0]}: {error.strerror}") from None


def _is_open(status: Mapping[str, Any]) -> bool:
    return status.get("cluster") == "slurm" and status.get("state") in ("queued", "running", "preempted")


def _parse(listing: str, wanted: set[str]) -> dict[str, Job]:
    found = {}
    for line in listing.splitlines():
        job_id, state, reason = line.strip().split("|", 2)
        if job_id in wanted:  # accounting writes "CANCELLED by 0"
            found[job_id] = Job(state.split()[0], reason if reason not in ("None", "0:0") else "")
    return found
