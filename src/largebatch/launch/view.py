"""The plan in the terminal: a live table, or plain lines in a pipe; and the table of the plan's runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from largebatch.launch.local import Outcome, Started
from largebatch.launch.plan import PlannedRun, notes
from largebatch.runs.metrics import newest
from largebatch.runs.table import Row, live_table, plain_table, print_table, run_rows, table_of
from largebatch.terminal import printable

if TYPE_CHECKING:
    from rich.live import Live

_LIVE_SECONDS, _PLAIN_SECONDS = 1.0, 30.0  # between looks at running runs, in a terminal and in a pipe
_MOST_NOTES = 12
_COLUMNS = {"label": "settings", "state": "state", "test/accuracy": "test", "seconds": "seconds", "folder": "folder"}


def plan_rows(plan: Sequence[PlannedRun]) -> list[Row]:
    """Return a row for each run of the plan; a run without a folder is new."""
    rows = run_rows([run.folder for run in plan])
    return [row | {"state": row["state"] or "new", "label": run.label} for run, row in zip(plan, rows, strict=True)]


def print_notes(plan: Sequence[PlannedRun]) -> None:
    """Print the options that do nothing, at most ``_MOST_NOTES``."""
    lines = notes(plan)
    for line in lines[:_MOST_NOTES]:
        print(printable(f"note: {line}"), flush=True)
    if len(lines) > _MOST_NOTES:
        print(f"note: {len(lines) - _MOST_NOTES} more options without effect; the report names them", flush=True)


def print_plan(rows: Sequence[Row]) -> None:
    print()
    print_table(table_of(rows, {k: heading for k, heading in _COLUMNS.items() if len(rows) > 1 or k != "label"}))


class PlanView:
    """Prints the start and the outcome of each run, and the progress of parallel runs.

    Args:
        parallel: runs at a time. A single run prints its own progress.
    """

    def __init__(self, plan: Sequence[PlannedRun], parallel: int) -> None:
        self._numbers = {run.folder.name: f"[{number}/{len(plan)}]" for number, run in enumerate(plan, start=1)}
        self._parallel = parallel
        self._ended = 0
        self._began: dict[str, tuple[float, int]] = {}  # time and step of the first look at each run
        self._looked = time.monotonic()
        self._live: Live | None = None
        if parallel > 1 and sys.stdout.isatty():
            import rich.live

            self._live = rich.live.Live(refresh_per_second=2)
            self._live.start()

    def begins(self, run: PlannedRun) -> None:
        self._print(f"{self._numbers[run.folder.name]} {run.folder.path}" + (f"  ({run.label})" if run.label else ""))

    def ended(self, outcome: Outcome) -> None:
        self._ended += 1
        number = "" if self._parallel == 1 else f"{self._numbers[outcome.run.folder.name]} "
        if outcome.state in ("failed", "busy"):
            self._print(f"error: {number}{outcome.message}", error=True)
            return
        number = number or "      "
        if outcome.skipped:
            self._print(f"{number}{outcome.state} before; not repeated (rerun=true repeats it)")
            return
        accuracy = run_rows([outcome.run.folder])[0]["test/accuracy"]
        result = f", test accuracy {100 * accuracy:.2f} %" if accuracy is not None else ""
        self._print(f"{number}{outcome.state}{result}{f': {outcome.message}' if outcome.message else ''}")

    def look(self, running: Sequence[Started]) -> None:
        """Show the progress of parallel runs: every second in a terminal, every half minute in a pipe."""
        now = time.monotonic()
        if self._parallel == 1 or now - self._looked < (_LIVE_SECONDS if self._live else _PLAIN_SECONDS):
            return
        self._looked = now
        rows = [self._progress(one.run) for one in running]
        if self._live:
            headline = f"{self._ended} of {len(self._numbers)} done, {len(running)} running"
            table = plain_table(["", "state", "step", "accuracy", "", "run"], rows)
            self._live.update(live_table(headline, table))
            return
        for number, *progress, _ in rows:
            self._print(f"{number} " + "  ".join(filter(None, progress)))

    def stopping(self, running: int) -> None:
        what = "this step" if running == 1 else f"the current step of {running} runs"
        self._print(f"\nstopping after {what}; Ctrl-C again stops at once")

    def stopped(self, runs: str) -> None:
        self.close()
        self._print(f"stopped; the same command resumes {runs}")

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def _progress(self, run: PlannedRun) -> list[str]:
        """Return number, state, step, accuracy, remaining time and label; empty strings if unknown."""
        folder = run.folder
        status = folder.read_status()
        step, steps = status.get("step") or 0, status.get("steps") or 0
        began, first = self._began.setdefault(folder.name, (time.monotonic(), step))
        accuracy = newest(folder.metrics, "test/accuracy", "train/accuracy")
        left = (time.monotonic() - began) / (step - first) * (steps - step) if step > first else 0
        return [
            self._numbers[folder.name],
            str(status.get("state")),
            f"step {step:,} of {steps:,}" if steps else "",
            f"{100 * accuracy:.2f} %" if accuracy is not None else "",
            f"{timedelta(seconds=round(left))} left" if step > first else "",
            run.label or folder.name,
        ]

    def _print(self, line: str, *, error: bool = False) -> None:
        line = printable(line)
        if self._live:
            self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr if error else sys.stdout, flush=True)
