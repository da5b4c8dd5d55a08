"""Run folders as a table."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from largebatch.run_folder import RunFolder

Row = dict[str, Any]


def run_row(folder: RunFolder) -> Row:
    """What a table shows of one run; figures that aren't there yet are None.

    ``state`` is ``interrupted`` for a run whose process is gone without having said how it ended.
    """
    status, summary = folder.read_status(), folder.read_summary()
    state = status.get("state")
    if state == "running" and not folder.is_held():
        state = "interrupted"
    return {
        "run": folder.name,
        "state": state,
        "step": status.get("step"),
        "steps": status.get("steps"),
        "test/accuracy": summary.get("test/accuracy"),
        "seconds": summary.get("wall_seconds"),
        "message": status.get("message", ""),
        "folder": str(folder.path),
    }


def list_runs(runs_dir: Path) -> list[RunFolder]:
    """The run folders below ``runs_dir``, by name: the folders that hold a status."""
    return [RunFolder(path.parent) for path in sorted(runs_dir.glob("*/status.json"))]


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


def in_words(seconds: float) -> str:
    """A length of time to two places: ``"3 h 05 min"``, ``"4 min 10 s"``, ``"12 s"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
