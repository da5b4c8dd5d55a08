"""The table of a plan: how each of its runs stands."""

from __future__ import annotations

from collections.abc import Sequence

from largebatch.launch.plan import PlannedRun
from largebatch.runs.table import Row, format_table, run_rows

_COLUMNS = {"label": "settings", "state": "state", "test/accuracy": "test", "seconds": "seconds", "folder": "folder"}


def print_table(plan: Sequence[PlannedRun]) -> None:
    print("\n" + plan_table(plan_rows(plan)), flush=True)


def plan_rows(plan: Sequence[PlannedRun]) -> list[Row]:
    """A row for each run of the plan; one that has no folder yet is new."""
    known = {row["run"]: row for row in run_rows(run.folder for run in plan if run.folder.path.exists())}
    new = {"state": "new"}
    found = []
    for run in plan:
        row = known.get(run.folder.name, {})
        found.append(
            new | {k: v for k, v in row.items() if v is not None} | {"label": run.label, "folder": str(run.folder.path)}
        )
    return found


def plan_table(rows: Sequence[Row]) -> str:
    return format_table(rows, {key: heading for key, heading in _COLUMNS.items() if len(rows) > 1 or key != "label"})
