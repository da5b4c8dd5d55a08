"""``largebatch status`` and ``largebatch logs``: states and log of runs, once or until the runs have ended."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from largebatch.errors import UserError
from largebatch.runs.folder import RunFolder
from largebatch.runs.screen import duration, wrapped
from largebatch.runs.table import Row, counted, news, print_runs, run_rows, runs_on_screen, seconds_to_go
from largebatch.terminal import printable

_LOOK_SECONDS = 2.0
_QUIET_SECONDS = 5.0  # in which the launcher of a grid starts its next run, which has no folder before
_LOG_SECONDS = 0.5  # between looks at a log
_STATE_SECONDS = 5.0  # between looks at the state of the log's run, which may ask SLURM
_OPEN = ("queued", "running")
_COLUMNS = {
    "run": "run", "state": "state", "step": "step", "steps": "of", "test/accuracy": "test", "seconds_left": "left",
    "job": "job", "node": "node", "news": "",
}  # fmt: skip


def show_status(folders: Sequence[RunFolder], *, as_json: bool) -> None:
    """Print a row for each run, and the number of runs in each state."""
    rows = _rows(folders)
    if as_json:
        print(json.dumps(rows, indent=1))
    elif rows:
        print_runs([row | {"news": news(row)} for row in rows], _COLUMNS)
        print(wrapped(f"\n{_headline(rows)}", sys.stdout))
    else:
        print("no runs")


def watch_status(find: Callable[[], Sequence[RunFolder]]) -> None:
    """Show states until no run is queued or running: a live table in a terminal, else a line for each change.

    Args:
        find: returns the runs, with those added since its last call.
    """
    if sys.stdout.isatty():
        from rich.live import Live
        from rich.text import Text

        order = {"running": 0, "failed": 1, "queued": 2}  # such runs come first; rich shows as many rows as fit
        with Live(screen=True, auto_refresh=False) as live:
            for rows in _looks(find):
                ordered = sorted(rows, key=lambda row: order.get(row["state"], 3))
                table = runs_on_screen(ordered, _COLUMNS, live.console.width, live=True)
                live.update(Text(f"{_headline(rows)}\n\n").append_text(table), refresh=True)
        show_status(find(), as_json=False)
        return
    states: dict[str, str] = {}
    for rows in _looks(find):
        for row in rows:
            if states.get(row["run"]) != row["state"]:
                states[row["run"]] = row["state"]
                line = f"{time.strftime('%H:%M:%S')} {row['run']} {row['state']}  {news(row)}"
                print(printable(line).rstrip(), flush=True)
    print(_headline(rows), flush=True)


def _looks(find: Callable[[], Sequence[RunFolder]]) -> Iterator[list[Row]]:
    """Yield the rows of the runs again and again until no run is queued or running, nor has just ended."""
    while True:
        rows = _rows(find())
        yield rows
        has_just_ended = any(abs(time.time() - (row["updated"] or 0.0)) < _QUIET_SECONDS for row in rows)
        if not (has_just_ended or any(row["state"] in _OPEN for row in rows)):
            return
        time.sleep(_LOOK_SECONDS)


def _rows(folders: Sequence[RunFolder]) -> list[Row]:
    try:
        return run_rows(folders)
    except UserError as error:
        print(f"warning: states without SLURM's view: {error}", file=sys.stderr)
        return run_rows(folders, ask_slurm=False)


def _headline(rows: list[Row]) -> str:
    left = seconds_to_go(rows)
    return f"{len(rows)} run(s): {counted(rows)}" + (f"; about {duration(left)} left" if left is not None else "")


def show_log(folder: RunFolder, lines: int | None, follow: bool) -> None:
    """Print a run's log, or SLURM's logs of its job if the run's own log is empty.

    Args:
        lines: print only the last ``lines``.
        follow: print new lines until the run is neither queued nor running.

    Raises:
        UserError: there is no log yet and ``follow`` is False, or the log can't be read.
    """
    logs = _logs(folder)
    if not logs and not follow:
        raise UserError(f"{folder.path}: no log yet; the run is {folder.state()}")
    for log in logs:
        if log != folder.log:
            print(f"==> {log}")
        try:
            text = log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise UserError(f"{log}: can't be read ({error.strerror})") from None
        print(printable("\n".join(text[-lines:] if lines is not None else text)), flush=True)
    if follow:
        _follow(folder, folder.log.stat().st_size if folder.log in logs else 0)


def _logs(folder: RunFolder) -> list[Path]:
    """Return the run's own log, or else SLURM's logs, which hold failures from before the run started."""
    of_job = sorted(folder.slurm.glob(f"{folder.read_status().get('job_id')}_*_log.*"))
    with_text = [path for path in (folder.log, *of_job) if path.exists() and path.stat().st_size > 0]
    return [folder.log] if folder.log in with_text else with_text


def _follow(folder: RunFolder, position: int) -> None:
    looked, is_open = 0.0, True
    while is_open:
        if time.monotonic() - looked >= _STATE_SECONDS:
            looked = time.monotonic()
            is_open = run_rows([folder])[0]["state"] in _OPEN
        if folder.log.exists():
            with folder.log.open("rb") as log:
                log.seek(position)
                new = log.read()
            position += len(new)
            print(printable(new.decode(errors="replace")), end="", flush=True)
        if is_open:
            time.sleep(_LOG_SECONDS)
