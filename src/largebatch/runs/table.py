"""Rows that describe runs, the search for runs by name, and tables for terminals and pipes."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from largebatch.errors import UserError
from largebatch.runs.folder import DONE, RESUMES, RunFolder, read_tail
from largebatch.runs.metrics import newest, seconds_left
from largebatch.runs.screen import duration, screen_table, split_names
from largebatch.runs.slurm_queue import Job, jobs_of
from largebatch.terminal import printable

if TYPE_CHECKING:
    from rich.text import Text

Row = dict[str, Any]
_STARTING_SECONDS = 120.0  # a worker on this machine has written its status by then
_OPTIONAL = ("job", "node", "seconds_left", "message")  # columns that a table lacks if all cells are empty
_NAMING = ("run", "label", "folder", "message", "news")  # columns that a terminal shows in another way


def run_rows(folders: Iterable[RunFolder], *, ask_slurm: bool = True) -> list[Row]:
    """Return a row for each run: its files joined with the states of SLURM's jobs, which take one call in all.

    Missing values are None. The state is ``interrupted`` if the run's process ended without writing an outcome, and
    ``unreadable`` if a file can't be read; the message then names the file.

    Raises:
        UserError: SLURM doesn't answer.
    """
    statuses = [(folder, _status(folder)) for folder in folders]
    jobs = jobs_of(status for _, status in statuses) if ask_slurm else {}
    return [_row(folder, status, jobs.get(str(status.get("job_id")))) for folder, status in statuses]


def _status(folder: RunFolder) -> dict[str, Any]:
    try:
        status = folder.read_status()
    except UserError as error:
        return {"state": "unreadable", "message": str(error)}
    for key, kind in (("state", str), ("message", str), ("updated", int | float)):
        if key in status and not isinstance(status[key], kind):
            return {"state": "unreadable", "message": f"{folder.status}: invalid {key} ({status[key]!r})"}
    return status


def _row(folder: RunFolder, status: dict[str, Any], job: Job | None) -> Row:
    state, message = status.get("state"), status.get("message", "")
    if job is not None and job.state != "UNKNOWN":
        state, message = _joined(str(state), str(message), job, status)
    elif _should_be_held(status, job) and not folder.is_held():
        state = "interrupted"
    summary: dict[str, Any] = {}
    accuracy, left, log = None, None, ""
    try:
        summary = folder.read_summary()
        accuracy = summary.get("test/accuracy") if state in DONE else newest(folder.metrics, "test/accuracy")
        if not isinstance(accuracy, int | float | None):
            raise UserError(f"{folder.summary}: invalid test/accuracy ({accuracy!r})")
        if state == "running" and isinstance(steps := status.get("steps"), int):
            left = seconds_left(folder.metrics, steps)
        log = next((line for line in reversed(read_tail(folder.log, 1 << 12)) if line.strip()), "")
    except UserError as error:
        state, message = "unreadable", str(error)
    return {
        "run": folder.name,
        "state": state,
        "step": status.get("step"),
        "steps": status.get("steps"),
        "test/accuracy": accuracy,
        "seconds": summary.get("wall_seconds"),
        "seconds_left": left,
        "job": status.get("job_id"),
        "node": status.get("node"),
        "message": message,
        "log": log,
        "updated": status.get("updated"),
        "folder": str(folder.path),
    }


def _should_be_held(status: dict[str, Any], job: Job | None) -> bool:
    """Return True if a process should hold the run's lock. ``job``: the run's job if SLURM has forgotten it."""
    if status.get("state") == "queued":
        late = abs(time.time() - status.get("updated", 0)) > _STARTING_SECONDS  # the clock may have been set back
        return job is not None or (status.get("cluster") == "local" and late)
    return status.get("state") == "running"


def _joined(state: str, message: str, job: Job, status: dict[str, Any]) -> tuple[str, str]:
    """Join state and message of a run that has no outcome with the state of its job."""
    if not job.ended:
        waits = f"SLURM: {job.reason or job.state}" if job.state != "RUNNING" else ""
        waiting = job.state == "PENDING" or state == "preempted"  # a requeued job starts again
        return ("queued" if waiting else state), "; ".join(filter(None, [message, waits]))
    if state == "preempted":
        return state, message
    reason = f" ({job.reason})" if job.reason else ""
    return "failed", f"SLURM ended job {status['job_id']}: {job.state}{reason}; {RESUMES}"


def list_runs(runs_dir: Path) -> list[RunFolder]:
    """Return the folders in ``runs_dir`` that hold a status, by name; also another user's that show nothing."""
    return [RunFolder(path) for path in sorted(runs_dir.iterdir() if runs_dir.is_dir() else ()) if _may_be_run(path)]


def _may_be_run(path: Path) -> bool:
    try:
        return (path / "status.json").exists()
    except PermissionError:
        return not path.name.startswith(".")


def find_runs(wanted: str, runs_dir: Path) -> list[RunFolder]:
    """Return the runs that ``wanted`` names.

    Args:
        wanted: a folder of runs, a run's folder, or the beginning of a run's name or of its last eight digits. A folder
            of runs may precede the beginning, as in ``runs/digits-res``.
        runs_dir: folder of the runs if ``wanted`` names none.

    Raises:
        UserError: there is no such run.
    """
    path = Path(wanted)
    if (path / "status.json").exists():
        return [RunFolder(path)]
    if path.is_dir():
        return list_runs(path)
    parent = path.parent if "/" in wanted else runs_dir
    if not parent.is_dir():
        raise UserError(f"{wanted}: {parent} is not a folder. Fix: give the folder that holds the runs")
    found = [
        folder
        for folder in list_runs(parent)
        if folder.name.startswith(path.name) or folder.name.rpartition("-")[2].startswith(path.name)
    ]
    if not found:
        raise UserError(
            f"{wanted}: no run in {parent} has a name or last eight digits with this beginning. "
            f"Fix: `largebatch status {parent}` lists the runs"
        )
    return found


def find_run(wanted: str, runs_dir: Path) -> RunFolder:
    """Return the one run that ``wanted`` names, as in ``find_runs``.

    Raises:
        UserError: there is no such run, or several.
    """
    found = find_runs(wanted, runs_dir)
    if len(found) != 1:
        names = "".join(f"\n  {folder.name}" for folder in found[:10])
        more = f"\n  and {len(found) - 10} more" if len(found) > 10 else ""
        raise UserError(f"{wanted}: matches {len(found)} runs. Fix: give more of the name or digits{names}{more}")
    return found[0]


def counted(rows: Iterable[Row]) -> str:
    """Return the number of rows in each state, in order of appearance: ``"3 finished, 1 running"``."""
    return ", ".join(f"{number} {state}" for state, number in Counter(str(row["state"]) for row in rows).items())


def seconds_to_go(rows: Sequence[Row]) -> float | None:
    """Estimate the seconds until no run is queued or running, or None without a run to estimate them from.

    A queued run counts as long as the mean of the finished runs. As many runs as now train at a time.
    """
    lefts = [row["seconds_left"] for row in rows if row["state"] == "running"]
    queued = sum(row["state"] == "queued" for row in rows)
    done = [row["seconds"] for row in rows if row["state"] in DONE and isinstance(row["seconds"], int | float)]
    known = [left for left in lefts if left is not None]
    if len(known) < len(lefts) or not (lefts or queued) or (queued and not done):
        return None
    waiting = queued * sum(done) / len(done) if queued else 0.0
    return float(max([(sum(known) + waiting) / max(len(known), 1), *known]))


def news(row: Row) -> str:
    """Return the reason for a run's state, or else the last line of its log if it has no outcome."""
    return str(row["message"] if row["message"] or row["state"] in DONE else row["log"])


def print_runs(rows: Sequence[Row], columns: dict[str, str]) -> None:
    """Print a table of runs. In a terminal it fits, with short names; elsewhere each row is one whole line.

    Args:
        columns: maps a row's keys to headings.
    """
    if sys.stdout.isatty():
        from rich.console import Console

        console = Console()
        console.print(runs_on_screen(rows, columns, console.width), soft_wrap=True)
    else:
        cells = [[_cell(key, row.get(key)) for key in _filled(rows, columns)] for row in rows]
        print(plain_table(list(_filled(rows, columns).values()), cells), flush=True)


def runs_on_screen(rows: Sequence[Row], columns: dict[str, str], width: int, *, live: bool = False) -> Text:
    """Return ``print_runs``'s table for a terminal. ``live``: each row is one line."""
    from rich.text import Text

    names, common = split_names([row["run"] for row in rows])
    labelled = any(row.get("label") for row in rows)
    shown: dict[str, list[str]] = {
        "run": [digits for digits, _ in names],
        "settings": [row["label"] if labelled else settings for row, (_, settings) in zip(rows, names, strict=True)],
    }
    for key, heading in _filled(rows, columns).items():
        if key not in _NAMING:
            shown[heading] = [_cell(key, row.get(key)) for row in rows]
    table = screen_table(shown, [news(row) for row in rows], width, live=live)
    return Text().append(f"all runs: {common}\n", "dim").append_text(table) if common and not labelled else table


def _filled(rows: Sequence[Row], columns: dict[str, str]) -> dict[str, str]:
    """Return the columns without optional ones that are empty."""
    empty = [key for key in _OPTIONAL if all(row.get(key) in (None, "") for row in rows)]
    return {key: heading for key, heading in columns.items() if key not in empty}


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key.endswith("/accuracy"):
        return f"{100 * value:.2f} %"
    if key == "seconds_left":
        return duration(value)
    return f"{value:.1f}" if key == "seconds" else str(value)


def plain_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as text, with two spaces between columns and whole cells."""
    columns = []
    for heading, *cells in zip(headings, *rows, strict=True):
        lines = [heading, *(printable(" ".join(cell.splitlines())) for cell in cells)]
        width = max(map(len, lines))
        numeric = any(cells) and all(cell[:1].isdigit() or cell in ("-", "") for cell in cells)
        columns.append([line.rjust(width) if numeric else line.ljust(width) for line in lines])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
