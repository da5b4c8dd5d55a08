"""``largebatch status``: the states of runs, once or until all runs have ended."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from largebatch.errors import UserError
from largebatch.runs.folder import DONE, RunFolder
from largebatch.runs.table import Row, counted, run_rows, table_of
from largebatch.runs.text_table import live_table, print_table

_LOOK_SECONDS = 2.0
_COLUMNS = {
    "run": "run", "state": "state", "step": "step", "steps": "of", "test/accuracy": "test", "job": "job",
    "node": "node", "news": "",
}  # fmt: skip


def show_status(folders: Sequence[RunFolder], *, as_json: bool) -> None:
    """Print a row for each run, and the number of runs in each state."""
    rows = _rows(folders)
    if as_json:
        print(json.dumps(rows, indent=1))
    elif rows:
        print_table(_table(rows))
        print(f"\n{_headline(rows)}")
    else:
        print("no runs")


def watch_status(find: Callable[[], Sequence[RunFolder]]) -> None:
    """Show states until no run is queued or running: a live table in a terminal, else a line for each change.

    Args:
        find: returns the runs, with those added since its last call.
    """
    if sys.stdout.isatty():
        from rich.live import Live

        order = {"running": 0, "queued": 1}  # such runs come first; rich shows as many rows as fit
        with Live(screen=True, auto_refresh=False) as live:
            for rows in _looks(find):
                table = _table(sorted(rows, key=lambda row: order.get(row["state"], 2)))
                live.update(live_table(_headline(rows), table), refresh=True)
        show_status(find(), as_json=False)
        return
    states: dict[str, str] = {}
    for rows in _looks(find):
        for row in rows:
            if states.get(row["run"]) != row["state"]:
                states[row["run"]] = row["state"]
                print(f"{time.strftime('%H:%M:%S')} {row['run']} {row['state']}  {_news(row)}".rstrip(), flush=True)
    print(_headline(rows), flush=True)


def _looks(find: Callable[[], Sequence[RunFolder]]) -> Iterator[list[Row]]:
    """Yield the rows of the runs again and again until no run is queued or running."""
    while True:
        rows = _rows(find())
        yield rows
        if not any(row["state"] in ("queued", "running") for row in rows):
            return
        time.sleep(_LOOK_SECONDS)


def _rows(folders: Sequence[RunFolder]) -> list[Row]:
    try:
        return run_rows(folders)
    except UserError as error:
        print(f"warning: states without SLURM's view: {error}", file=sys.stderr)
        return run_rows(folders, ask_slurm=False)


def _headline(rows: list[Row]) -> str:
    return f"{len(rows)} run(s): {counted(rows)}"


def _table(rows: list[Row]) -> str:
    """Return the table of the runs, without SLURM's columns if no run has a job."""
    columns = {
        key: heading
        for key, heading in _COLUMNS.items()
        if key not in ("job", "node") or any(row.get(key) is not None for row in rows)
    }
    return table_of([row | {"news": _news(row)} for row in rows], columns)


def _news(row: Row) -> str:
    """Return the reason for a run's state, or else the last line of its log if it has no outcome."""
    return str(row["message"] if row["message"] or row["state"] in DONE else row["log"])
