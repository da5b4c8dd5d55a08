"""Run folders as a table."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from largebatch.launch.slurm_queue import Job, jobs_of
from largebatch.run_folder import RESUMES, RunFolder

Row = dict[str, Any]


def run_rows(folders: Iterable[RunFolder]) -> list[Row]:
    """The rows of several runs, joined with what SLURM says of their jobs; it is asked once for all.

    Raises:
        UserError: when SLURM has to be asked and doesn't answer.
    """
    listed = [(folder, folder.read_status()) for folder in folders]
    jobs = jobs_of(status for _, status in listed)
    return [_row(folder, status, jobs.get(str(status.get("job_id")))) for folder, status in listed]


def run_row(folder: RunFolder) -> Row:
    """What a table shows of one run; figures that aren't there yet are None.

    ``state`` is ``interrupted`` for a run whose process is gone without having said how it ended.
    """
    return _row(folder, folder.read_status(), None)


def _row(folder: RunFolder, status: dict[str, Any], job: Job | None) -> Row:
    summary = folder.read_summary()
    state, message = status.get("state"), status.get("message", "")
    if job is not None and job.state != "UNKNOWN":
        state, message = _joined(str(state), str(message), job, status)
    elif (state == "running" or (state == "queued" and job is not None)) and not folder.is_held():
        state = "interrupted"
    return {
        "run": folder.name,
        "state": state,
        "step": status.get("step"),
        "steps": status.get("steps"),
        "test/accuracy": summary.get("test/accuracy"),
        "seconds": summary.get("wall_seconds"),
        "job": status.get("job_id"),
        "node": status.get("node"),
        "message": message,
        "folder": str(folder.path),
    }


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


def format_table(rows: Iterable[Row], columns: dict[str, str], style: str = "simple") -> str:
    """A plain-text table, or one in another of tabulate's styles; ``columns`` maps a row's keys to headings."""
    cells = [[_cell(key, row.get(key)) for key in columns] for row in rows]
    return tabulate(cells, headers=list(columns.values()), tablefmt=style)


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
