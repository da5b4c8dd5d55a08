"""What SLURM says of its jobs. Needs neither accounting nor submitit."""

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
_SUBMITTING_SECONDS = 600.0  # after which a launcher that never wrote down a job's number is taken for dead


@dataclass(frozen=True)
class Job:
    """A job, or an element of an array, as SLURM sees it."""

    state: str  # SLURM's word: PENDING, RUNNING, TIMEOUT, ...
    reason: str = ""  # why it waits, or how it ended, where SLURM says

    @property
    def ended(self) -> bool:
        return self.state in _ENDED


Jobs = Mapping[str, Job]  # by their numbers, as 12 or 12_3


def slurm_states(job_ids: Iterable[str]) -> dict[str, Job]:
    """SLURM's view of jobs, of as many as it knows: one call of ``squeue``, and one of ``sacct`` for those it forgot.

    Args:
        job_ids: as ``12``, or ``12_3`` for an element of an array.

    Raises:
        UserError: when SLURM doesn't answer, in its words.
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
    """The same for the jobs of runs that haven't ended by their own word; UNKNOWN where SLURM has forgotten them."""
    job_ids = [job for status in statuses if (job := _job_of(status))]
    if shutil.which("squeue") is None:
        return {}
    return dict.fromkeys(job_ids, Job("UNKNOWN")) | slurm_states(job_ids)


def has_it(status: Mapping[str, Any], jobs: Jobs | None = None) -> str:
    """Which job has the run of this ``status``, in words; empty where none has. ``jobs``: what was asked before."""
    if status.get("cluster") != "slurm" or status.get("state") not in ("queued", "running", "preempted"):
        return ""
    job_id = _job_of(status)
    if job_id is None:
        fresh = time.time() - status.get("updated", 0) < _SUBMITTING_SECONDS
        return "is being submitted to SLURM by another launcher" if fresh and status["state"] == "queued" else ""
    if jobs is None or job_id not in jobs:  # or it came after the others were asked for
        jobs = slurm_states([job_id])
    job = jobs.get(job_id)
    return "" if job is None or job.ended else f"is in SLURM's queue already: job {job_id}, {job.state}"


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands.

    Raises:
        UserError: when it doesn't answer, or isn't there.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{command[0]}: SLURM didn't answer within {_PATIENCE_SECONDS:.0f} s; try again later"
        ) from None
    except OSError as error:
        raise UserError(f"{command[0]}: {error.strerror}") from None


def _job_of(status: Mapping[str, Any]) -> str | None:
    open_ended = status.get("cluster") == "slurm" and status.get("state") in ("queued", "running", "preempted")
    job_id = status.get("job_id")
    return str(job_id) if open_ended and job_id else None


def _parse(listing: str, wanted: set[str]) -> dict[str, Job]:
    found = {}
    for line in listing.splitlines():
        job_id, state, reason = line.strip().split("|", 2)
        if job_id in wanted:  # "CANCELLED by 0" is how accounting says it
            found[job_id] = Job(state.split()[0], reason if reason not in ("None", "0:0") else "")
    return found
