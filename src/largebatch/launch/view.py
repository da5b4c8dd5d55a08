"""The plan in the terminal: a live table, or plain lines in a pipe; and the table of the plan's runs."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from largebatch.launch.local import Outcome, Started
from largebatch.launch.plan import PlannedRun, expected_seconds, notes
from largebatch.runs.metrics import newest
from largebatch.runs.screen import duration, short_label, wrapped
from largebatch.runs.table import Row, print_runs, run_rows, runs_on_screen
from largebatch.terminal import printable

if TYPE_CHECKING:
    from rich.live import Live

_LIVE_SECONDS, _PLAIN_SECONDS = 1.0, 30.0  # between looks at running runs, in a terminal and in a pipe
_MOST_NOTES = 12
_COLUMNS = {
    "label": "settings", "state": "state", "test/accuracy": "test", "seconds": "seconds", "folder": "folder",
    "message": "message",
}  # fmt: skip
_LIVE_COLUMNS = {
    "label": "settings", "state": "state", "step": "step", "steps": "of", "test/accuracy": "accuracy",
    "seconds_left": "left",
}  # fmt: skip


def plan_rows(plan: Sequence[PlannedRun], outcomes: Mapping[str, Outcome] | None = None) -> list[Row]:
    """Return a row for each run of the plan; a run without a folder is new, or as its outcome tells.

    Args:
        outcomes: by the name of the run's folder.
    """
    rows = run_rows([run.folder for run in plan])
    for run, row in zip(plan, rows, strict=True):
        row["label"] = run.label
        outcome = (outcomes or {}).get(run.folder.name)
        if row["state"] is None:
            row["state"] = outcome.state if outcome else "new"
            row["message"] = outcome.message if outcome else ""
    return rows


def print_notes(plan: Sequence[PlannedRun]) -> None:
    """Print the options that do nothing, at most ``_MOST_NOTES``."""
    lines = notes(plan)
    for line in lines[:_MOST_NOTES]:
        print(wrapped(printable(f"note: {line}"), sys.stdout), flush=True)
    if len(lines) > _MOST_NOTES:
        print(f"note: {len(lines) - _MOST_NOTES} more options without effect; the report names them", flush=True)


def print_plan(rows: Sequence[Row]) -> None:
    print()
    columns = {k: heading for k, heading in _COLUMNS.items() if len(rows) > 1 or k != "label"}
    if sys.stdout.isatty():
        rows = [row | {"label": short_label(row["label"])} for row in rows]
    print_runs(rows, columns)


def print_report_command(runs_dir: Path, options: str, when: str = "next") -> None:
    shown = runs_dir.relative_to(Path.cwd()) if runs_dir.is_relative_to(Path.cwd()) else runs_dir
    print(f"\n{when}: largebatch report {shlex.quote(str(shown))}{options}", flush=True)


class PlanView:
    """Prints the start and the outcome of each run, and the progress of parallel runs.

    Args:
        parallel: runs at a time. A single run prints its own progress.

    Attributes:
        outcomes: of the runs that have ended, by the name of their folders.
    """

    def __init__(self, plan: Sequence[PlannedRun], parallel: int) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self._numbers = {run.folder.name: f"[{number}/{len(plan)}]" for number, run in enumerate(plan, start=1)}
        self._waiting = {run.folder.name: run for run in plan}
        self._parallel = parallel
        self._expected: tuple[int, int, float | None] = (-1, -1, None)  # outcomes, waiting runs, their seconds
        self._looked = time.monotonic()
        self._live: Live | None = None
        if parallel > 1 and sys.stdout.isatty():
            import rich.live

            self._live = rich.live.Live(refresh_per_second=2)
            self._live.start()

    def begins(self, run: PlannedRun) -> None:
        self._waiting.pop(run.folder.name, None)
        self._print(f"{self._numbers[run.folder.name]} {run.folder.path}" + (f"  ({run.label})" if run.label else ""))

    def ended(self, outcome: Outcome) -> None:
        self.outcomes[outcome.run.folder.name] = outcome
        number = "" if self._parallel == 1 else f"{self._numbers[outcome.run.folder.name]} "
        if outcome.state in ("failed", "busy"):
            self._print(f"error: {number}{outcome.message}", error=True)
            return
        number = number or "      "
        accuracy = run_rows([outcome.run.folder], ask_slurm=False)[0]["test/accuracy"]
        result = f", test accuracy {100 * accuracy:.2f} %" if accuracy is not None else ""
        if outcome.skipped:
            self._print(f"{number}{outcome.state} before{result}; not repeated (rerun=true repeats it)")
            return
        self._print(f"{number}{outcome.state}{result}{f': {outcome.message}' if outcome.message else ''}")
        if self._parallel == 1 and self._waiting:
            self._print(f"      {len(self._waiting)} to go{self._left([])}")

    def look(self, running: Sequence[Started]) -> None:
        """Show the progress of parallel runs: every second in a terminal, every half minute in a pipe."""
        now = time.monotonic()
        if self._parallel == 1 or now - self._looked < (_LIVE_SECONDS if self._live else _PLAIN_SECONDS):
            return
        self._looked = now
        rows = [self._progress(one.run) for one in running]
        headline = f"{len(self.outcomes)} of {len(self._numbers)} done, {len(running)} running{self._left(rows)}"
        if self._live:
            from rich.text import Text

            table = runs_on_screen(rows, _LIVE_COLUMNS, self._live.console.width, live=True)
            self._live.update(Text(f"{headline}\n\n").append_text(table))
            return
        self._print(headline)
        for row in rows:
            self._print("  ".join(filter(None, [self._numbers[row["run"]], row["state"], _progress_text(row)])))

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

    def _left(self, running: Sequence[Row]) -> str:
        """Return ``", about 0:12:30 left"`` for the whole plan, or an empty text if no run tells."""
        if self._expected[:2] != (len(self.outcomes), len(self._waiting)):
            seconds = expected_seconds(list(self._waiting.values())) if self._waiting else 0.0
            self._expected = len(self.outcomes), len(self._waiting), seconds
        lefts = [row["seconds_left"] for row in running]
        if self._expected[2] is None or None in lefts:
            return ""
        return f", about {duration(max([(self._expected[2] + sum(lefts)) / self._parallel, *lefts]))} left"

    def _progress(self, run: PlannedRun) -> Row:
        """Return a run's row with its newest accuracy: on test images, or else in training."""
        (row,) = run_rows([run.folder], ask_slurm=False)
        if row["state"] != "unreadable":
            row["test/accuracy"] = newest(run.folder.metrics, "test/accuracy", "train/accuracy")
        label = short_label(run.label) if self._live else run.label
        return row | {"label": f"{self._numbers[run.folder.name]} {label or run.folder.name}", "log": ""}

    def _print(self, line: str, *, error: bool = False) -> None:
        line = printable(line)
        if self._live:
            self._live.console.print(wrapped(line, sys.stdout), markup=False, highlight=False, soft_wrap=True)
        else:
            stream = sys.stderr if error else sys.stdout
            # A killed worker leaves its progress bar; this replaces it.
            clear = "\r\x1b[K" if error and stream.isatty() else ""
            print(clear + wrapped(line, stream), file=stream, flush=True)


def _progress_text(row: Row) -> str:
    """Return ``"step 120 of 400  76.10 %  0:00:12 left"``, without unknown parts."""
    return "  ".join(filter(None, [
        f"step {row['step'] or 0:,} of {row['steps']:,}" if row["steps"] else "",
        f"{100 * row['test/accuracy']:.2f} %" if row["test/accuracy"] is not None else "",
        f"{duration(row['seconds_left'])} left" if row["seconds_left"] is not None else "",
    ]))  # fmt: skip
