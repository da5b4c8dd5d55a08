"""Carrying a plan out, run by run, and the table that closes it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from largebatch.launch.local import Outcome, StoppedByUser, carry_out
from largebatch.launch.plan import PlannedRun
from largebatch.report.table import format_table, run_row

_COLUMNS = {"label": "settings", "state": "state", "test/accuracy": "test", "seconds": "seconds", "folder": "folder"}


def carry_out_plan(plan: Sequence[PlannedRun]) -> int:
    """Carry out every run; one that fails doesn't stop the others. Returns the exit code of the program.

    0: every run has an outcome (a divergence is one); 1: a run failed; 2: what failed is the user's to mend;
    130: stopped by Ctrl-C.
    """
    outcomes: list[Outcome] = []
    try:
        for number, run in enumerate(plan, start=1):
            _say(f"[{number}/{len(plan)}] {run.folder.path}" + (f"  ({run.label})" if run.label else ""))
            outcome = carry_out(run)
            outcomes.append(outcome)
            _report(outcome)
    except StoppedByUser as stopped:
        _say(f"stopped; the same command resumes {stopped}")
        return 130
    finally:
        if len(plan) > 1:
            _say("\n" + _table(plan))
    if len(plan) > 1:  # another launcher that shares the grid is no failure of this one
        outcomes = [outcome for outcome in outcomes if outcome.state != "busy"]
    codes = {outcome.exit_code for outcome in outcomes} - {0}
    return min(codes) if codes else 0


def show_plan(plan: Sequence[PlannedRun]) -> int:
    """What would be done: the runs, how each stands, and what tells them apart."""
    _say(f"{len(plan)} run(s); nothing is started (dry_run=true)\n")
    _say(_table(plan))
    return 0


def _report(outcome: Outcome) -> None:
    row = run_row(outcome.run.folder)
    if outcome.state in ("failed", "busy"):
        print(f"error: {outcome.message}", file=sys.stderr, flush=True)
    elif outcome.skipped:
        _say(f"      {outcome.state} before; not repeated (rerun=true repeats it)")
    else:
        accuracy = row["test/accuracy"]
        figure = f", test accuracy {100 * accuracy:.2f} %" if accuracy is not None else ""
        _say(f"      {outcome.state}{figure}{f': {outcome.message}' if outcome.message else ''}")


def _table(plan: Sequence[PlannedRun]) -> str:
    rows = []
    for run in plan:
        row = run_row(run.folder) if run.folder.path.exists() else {"folder": str(run.folder.path)}
        rows.append({"state": "new", **{k: v for k, v in row.items() if v is not None}, "label": run.label})
    return format_table(rows, _COLUMNS if len(plan) > 1 else {k: v for k, v in _COLUMNS.items() if k != "label"})


def _say(text: str) -> None:
    print(text, flush=True)
