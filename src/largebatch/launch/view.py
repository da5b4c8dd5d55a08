"""What the user sees while a plan is carried out: a table that moves in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from largebatch.launch.local import Outcome, Started
from largebatch.launch.plan import PlannedRun
from largebatch.runs.metrics import newest
from largebatch.runs.table import duration, run_row

if TYPE_CHECKING:
    from rich.live import Live

_LOOK_SECONDS = 1.0  # between looks at the folders of the runs at work
_PLAIN_EVERY_SECONDS = 30.0


class PlanView:
    """Says what begins and ends, and how the runs at work are doing where they don't say it themselves.

    Args:
        parallel: runs at a time. A run alone speaks for itself.
    """

    def __init__(self, plan: Sequence[PlannedRun], parallel: int) -> None:
        self._numbers = {run.folder.name: number for number, run in enumerate(plan, start=1)}
        self._parallel = parallel
        self._ended = 0
        self._began: dict[str, tuple[float, int]] = {}  # when a run was first seen at work, and its step then
        self._looked = self._spoke = time.monotonic()
        self._live: Live | None = None
        if parallel > 1 and sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(refresh_per_second=2)
            self._live.start()

    def begins(self, run: PlannedRun) -> None:
        self._say(f"{self._number(run)} {run.folder.path}" + (f"  ({run.label})" if run.label else ""))

    def ended(self, outcome: Outcome) -> None:
        self._ended += 1
        where = "     " if self._parallel == 1 else self._number(outcome.run)
        if outcome.state in ("failed", "busy"):
            which = "" if self._parallel == 1 else f"{self._number(outcome.run)} "
            self._say(f"error: {which}{outcome.message}", error=True)
        elif outcome.skipped:
            self._say(f"{where} {outcome.state} before; not repeated (rerun=true repeats it)")
        else:
            accuracy = run_row(outcome.run.folder)["test/accuracy"]
            figure = f", test accuracy {100 * accuracy:.2f} %" if accuracy is not None else ""
            self._say(f"{where} {outcome.state}{figure}{f': {outcome.message}' if outcome.message else ''}")

    def look(self, working: Sequence[Started]) -> None:
        """Show how the runs at work are doing, now and then."""
        now = time.monotonic()
        if self._parallel == 1 or now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        if self._live:
            self._live.update(self._table(working))
        elif now - self._spoke >= _PLAIN_EVERY_SECONDS:
            self._spoke = now
            for started in working:
                self._say(f"{self._number(started.run)} " + "  ".join(filter(None, self._progress(started).values())))

    def stopping(self, working: int) -> None:
        what = "this step" if working == 1 else f"the step that each of {working} runs is in"
        self._say(f"\nstopping after {what}; Ctrl-C again stops at once")

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def _number(self, run: PlannedRun) -> str:
        return f"[{self._numbers[run.folder.name]}/{len(self._numbers)}]"

    def _progress(self, started: Started) -> dict[str, str]:
        """How a run is doing, in words."""
        folder = started.run.folder
        status = folder.read_status()
        step, steps = status.get("step") or 0, status.get("steps") or 0
        began, first = self._began.setdefault(folder.name, (time.monotonic(), step))
        accuracy = newest(folder.metrics, "test/accuracy", "train/accuracy")
        taken = time.monotonic() - began
        left = duration(taken / (step - first) * (steps - step)) + " left" if step > first else ""
        return {
            "state": str(status.get("state")),
            "step": f"step {step:,} of {steps:,}" if steps else "",
            "accuracy": f"{100 * accuracy:.2f} %" if accuracy is not None else "",
            "left": left,
        }

    def _table(self, working: Sequence[Started]) -> Any:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, title_justify="left")
        table.title = f"{self._ended} of {len(self._numbers)} done, {len(working)} at work"
        for heading in ("", "run", "state", "step", "accuracy", ""):
            table.add_column(heading)
        for started in working:
            name = started.run.label or started.run.folder.name
            table.add_row(self._number(started.run), name, *self._progress(started).values())
        return table

    def _say(self, line: str, *, error: bool = False) -> None:
        if self._live:
            self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr if error else sys.stdout, flush=True)
