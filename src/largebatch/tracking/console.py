"""What rank 0 says: to ``log.txt`` always, to the terminal as a progress bar, to a file or SLURM log as plain lines."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

_PLAIN_EVERY_SECONDS = 10.0


class Console:
    """Lines and progress of one run; on ranks other than 0 silent.

    Args:
        log: the file that every line is appended to, with the time.
        speaking: whether this process is the one that speaks.
    """

    def __init__(self, log: Path, speaking: bool) -> None:
        self._log = log.open("a") if speaking else None
        self._bar: tqdm[Any] | None = None
        self._last_plain = time.monotonic()
        self._steps = 0

    def say(self, line: str) -> None:
        if self._log is None:
            return
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        self._log.flush()
        tqdm.write(f"      {line}", file=sys.stdout)
        sys.stdout.flush()

    def start_progress(self, step: int, steps: int) -> None:
        self._steps = steps
        if self._log is not None and sys.stdout.isatty():
            self._bar = tqdm(initial=step, total=steps, unit="step", file=sys.stdout, dynamic_ncols=True, leave=False)

    def progress(self, step: int, figures: str) -> None:
        """Called at logged steps. In a terminal the bar moves; elsewhere a line appears every ten seconds."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(figures, refresh=False)
        elif time.monotonic() - self._last_plain >= _PLAIN_EVERY_SECONDS:
            self._last_plain = time.monotonic()
            self.say(f"step {step}/{self._steps}  {figures}")

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._log is not None:
            self._log.close()
