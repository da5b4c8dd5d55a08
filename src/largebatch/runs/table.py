"""Run folders as a table."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from largebatch.errors import UserError
from largebatch.runs.folder import DONE, RESUMES, RunFolder, read_tail
from largebatch.runs.metrics import newest
from largebatch.runs.slurm_queue import Job, Jobs, jobs_of

Row = dict[str, Any]
_STARTING_SECONDS = 120.0  # after which a worker that this machine's launcher started would have said something


def run_rows(folders: Iterable[RunFolder]) -> list[Row]:
    """The rows of several runs, joined with what SLURM says of their jobs; it is asked once for all.

    A folder whose files can't be read has the state ``unreadable``, and a message that says which.

    Raises:
        UserError: when SLURM has to be asked and doesn't answer.
    """
    listed = [(folder, _status_of(folder)) for folder in folders]
    jobs = jobs_of(status for _, status in listed if not isinstance(status, str))
    return [_readable_row(folder, status, jobs) for folder, status in listed]


def run_row(folder: RunFolder) -> Row:
    """What a table shows of one run; figures that aren't there yet are None.

    ``state`` is ``interrupted`` for a run whose process is gone without having said how it ended.
    """
    return _row(folder, folder.read_status(), None)


def _status_of(folder: RunFolder) -> dict[str, Any] | str:
    """The run's status, or what is wrong with its file."""
    try:
        return folder.read_status()
    except UserError as error:
        return str(error)


def _readable_row(folder: RunFolder, status: dict[str, Any] | str, jobs: Jobs) -> Row:
    try:
        if isinstance(status, str):
            raise UserError(status)
        return _row(folder, status, jobs.get(str(status.get("job_id"))))
    except UserError as error:
        return {"run": folder.name, "state": "unreadable", "message": str(error), "folder": str(folder.path)}


def _row(folder: RunFolder, status: dict[str, Any], job: Job | None) -> Row:
    summary = folder.read_summary()
    state, message = status.get("state"), status.get("message", "")
    if job is not None and job.state != "UNKNOWN":
        state, message = _joined(str(state), str(message), job, status)
    elif _should_be_at_work(status, job) and not folder.is_held():
        state = "interrupted"
    accuracy = summary.get("test/accuracy") if state in DONE else newest(folder.metrics, "test/accuracy")
    return {
        "run": folder.name,
        "state": state,
        "step": status.get("step"),
        "steps": status.get("steps"),
        "test/accuracy": accuracy,
        "seconds": summary.get("wall_seconds"),
        "job": status.get("job_id"),
        "node": status.get("node"),
        "message": message,
        "log": next((line for line in reversed(read_tail(folder.log, 1 << 12)) if line.strip()), ""),
        "folder": str(folder.path),
    }


def _should_be_at_work(status: dict[str, Any], job: Job | None) -> bool:
    """Whether some process has the run's lock, by its own word; one of SLURM's when SLURM has forgotten its job."""
    if status.get("state") == "queued":
        return job is not None or (
            status.get("cluster") == "local" and time.time() - status.get("updated", 0) > _STARTING_SECONDS
        )
    return status.get("state") == "running"


def _joined(state: str, message: str, job: Job, status: dict[str, Any]) -> tuple[str, str]:
    """State and message of a run that hasn't ended by its own word, with its job's."""
    if not job.ended:
        waits = f"SLURM: {job.reason or job.state}" if job.state != "RUNNING" else ""
        waiting = job.state == "PENDING" or state == "preempted"  # and begins again
        return ("queued" if waiting else state), "; ".join(filter(None, [message, waits]))
    if state == "preempted":
        return state, message
    reason = f" ({job.reason})" if job.reason else ""
    return "failed", f"SLURM ended job {status['job_id']}: {job.state}{reason}; {RESUMES}"


def list_runs(runs_dir: Path) -> list[RunFolder]:
    """The run folders below ``runs_dir``, by name: the folders that hold a status."""
    return [RunFolder(path.parent) for path in sorted(runs_dir.glob("*/status.json"))]


def find_runs(wanted: str, runs_dir: Path) -> list[RunFolder]:
    """The runs that ``wanted`` names: a folder of runs, a run's folder, or the beginning of its name or of its digits.

    Args:
        wanted: a name's beginning may have the folder of the runs before it, as ``runs/digits-res``.
        runs_dir: that folder where it has none.

    Raises:
        UserError: when there is no such run.
    """
    path = Path(wanted)
    if (path / "status.json").exists():
        return [RunFolder(path)]
    if path.is_dir():
        return list_runs(path)
    parent = path.parent if "/" in wanted else runs_dir
    if not parent.is_dir():
        raise UserError(f"{wanted}: {parent} is not a folder; give the folder that holds the runs")
    found = [
        folder
        for folder in list_runs(parent)
        if folder.name.startswith(path.name) or folder.name.rpartition("-")[2].startswith(path.name)
    ]
    if not found:
        raise UserError(
            f"{wanted}: no run in {parent} whose name, or whose last eight digits, begin so; "
            f"`largebatch status {parent}` lists them"
        )
    return found


def find_run(wanted: str, runs_dir: Path) -> RunFolder:
    """The one run that ``wanted`` names, as for ``find_runs``.

    Raises:
        UserError: when there is none, or there are several.
    """
    found = find_runs(wanted, runs_dir)
    if len(found) != 1:
        names = "".join(f"\n  {folder.name}" for folder in found[:10])
        more = f"\n  and {len(found) - 10} more" if len(found) > 10 else ""
        raise UserError(f"{wanted}: means {len(found)} runs; give more of the name, or its last digits{names}{more}")
    return found[0]


def counted(rows: Iterable[Row]) -> str:
    """``"3 finished, 1 running, 14 new"``, in the order in which the states come."""
    return ", ".join(f"{number} {state}" for state, number in Counter(str(row["state"]) for row in rows).items())


def format_table(rows: Iterable[Row], columns: dict[str, str]) -> str:
    """A plain-text table; ``columns`` maps a row's keys to headings."""
    return tabulate([[_cell(key, row.get(key)) for key in columns] for row in rows], headers=list(columns.values()))


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key.endswith("/accuracy"):
        return f"{100 * value:.2f} %"
    if key == "seconds":
        return f"{value:.1f}"
    return str(value)


def duration(seconds: float) -> str:
    """A length of time to two places: ``"3 h 05 min"``, ``"4 min 10 s"``, ``"12 s"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
