"""How runs stand: once, or over and over until none is at work."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from largebatch.errors import UserError
from largebatch.runs.folder import RunFolder
from largebatch.runs.table import Row, counted, format_table, run_row, run_rows

if TYPE_CHECKING:
    from rich.console import Group

_LOOK_SECONDS = 2.0
_OPEN = ("queued", "running")  # what goes on by itself
_COLUMNS = {
    "run": "run", "state": "state", "step": "step", "steps": "of", "test/accuracy": "test", "job": "job",
    "node": "node", "said": "",
}  # fmt: skip


def show_status(folders: Sequence[RunFolder], *, as_json: bool) -> None:
    """Print a row for each run, and how many there are in each state."""
    rows = _rows(folders)
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"{_table(rows)}\n\n{_headline(rows)}" if rows else "no runs")


def watch_status(find: Callable[[], Sequence[RunFolder]]) -> None:
    """Show the same until no run is queued or running: in a terminal in place, elsewhere a line for each change.

    Args:
        find: the runs, among them those that came since it was last called.
    """
    if sys.stdout.isatty():
        _watch_in_place(find)
        show_status(find(), as_json=False)
        return
    told: dict[str, str] = {}
    while True:
        rows = _rows(find())
        for row in rows:
            if told.get(row["run"]) != row["state"]:
                told[row["run"]] = row["state"]
                print(f"{time.strftime('%H:%M:%S')} {row['run']} {row['state']}  {_said(row)}".rstrip(), flush=True)
        if not _goes_on(rows):
            print(_headline(rows), flush=True)
            return
        time.sleep(_LOOK_SECONDS)


def _watch_in_place(find: Callable[[], Sequence[RunFolder]]) -> None:
    from rich.live import Live

    with Live(screen=True, auto_refresh=False) as live:
        while True:
            rows = _rows(find())
            live.update(_screen(rows), refresh=True)
            if not _goes_on(rows):
                return
            time.sleep(_LOOK_SECONDS)


def _screen(rows: list[Row]) -> Group:
    """Runs at work first, as many lines as the terminal has."""
    from rich.console import Group
    from rich.text import Text

    order = {"running": 0, "queued": 1}
    ordered = sorted(rows, key=lambda row: order.get(row["state"], 2))
    lines = [_headline(rows), "", *_table(ordered).splitlines()]
    return Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))


def _rows(folders: Sequence[RunFolder]) -> list[Row]:
    try:
        return run_rows(folders)
    except UserError as error:
        print(f"warning: states are without SLURM's view: {error}", file=sys.stderr)
        return [run_row(folder) for folder in folders]


def _goes_on(rows: list[Row]) -> bool:
    return any(row["state"] in _OPEN for row in rows)


def _headline(rows: list[Row]) -> str:
    return f"{len(rows)} run(s): {counted(rows)}"


def _table(rows: list[Row]) -> str:
    shown = [row | {"said": _said(row)} for row in rows]
    return format_table(shown, {key: heading for key, heading in _COLUMNS.items() if _wanted(key, shown)})


def _wanted(key: str, rows: list[Row]) -> bool:
    """The columns of SLURM's jobs are there where there are jobs."""
    return key not in ("job", "node") or any(row.get(key) is not None for row in rows)


def _said(row: Row) -> str:
    """Why a run is in its state, or else the last thing that it said, unless it has nothing more to say."""
    if row["message"] or row["state"] in ("finished", "diverged"):
        return str(row["message"])
    return str(row.get("log") or "")
