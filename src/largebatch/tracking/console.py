"""Output of rank 0: always to ``log.txt``; to a terminal as a progress bar, to a file or SLURM log as plain lines."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from largebatch.runs.screen import wrapped
from largebatch.terminal import printable

_PLAIN_EVERY_SECONDS = 10.0


class Console:
    """Lines and progress of one run; silent on ranks other than 0.

    Args:
        log: the file to append each line to, with its time.
        speaking: True on rank 0.
    """

    def __init__(self, log: Path, speaking: bool) -> None:
        self._log = log.open("ab", buffering=0) if speaking else None
        self._bar: tqdm[Any] | None = None
        self._last_plain = time.monotonic()
        self._steps = 0

    def say(self, line: str) -> None:
        """Print a line and append it to the log."""
        if self._log is None:
            return
        line = printable(line)
        with contextlib.suppress(OSError):  # a full disk doesn't end the training here
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n".encode(errors="backslashreplace"))
        tqdm.write(wrapped(f"      {line}", sys.stdout), file=sys.stdout)
        sys.stdout.flush()

    def start_progress(self, step: int, steps: int) -> None:
        """Start the progress bar at ``step`` of ``steps``."""
        self._steps = steps
        if self._log is not None and sys.stdout.isatty():
            self._bar = tqdm(initial=step, total=steps, unit="step", file=sys.stdout, dynamic_ncols=True, leave=False)

    def set_steps(self, steps: int) -> None:
        """Change the number of steps of the progress bar."""
        self._steps = steps
        if self._bar is not None:
            self._bar.total = steps

    def progress(self, step: int, metrics: str) -> None:
        """Show a logged step: on the bar in a terminal, elsewhere as a line every ten seconds."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(metrics, refresh=False)
        elif time.monotonic() - self._last_plain >= _PLAIN_EVERY_SECONDS:
            self._last_plain = time.monotonic()
            self.say(f"step {step}/{self._steps}  {metrics}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._log is not None:
            self._log.close()
