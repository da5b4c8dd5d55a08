"""Agreement of all processes on the steps at which to save and stop."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist


class StepBoundary:
    """Decision after each optimizer step to save or to stop, the same in every process.

    SIGINT, SIGTERM and SIGUSR2 (from SLURM before a time limit) request a stop. The clock of rank 0, or the step count,
    requests a checkpoint. Several processes sum their requests in the background during the next step, so that no step
    waits. Requests therefore take effect one step later.
    """

    def __init__(self, every_seconds: float, every_steps: int | None, rank: int) -> None:
        self.asked_to_stop = False
        self._every_seconds = every_seconds
        self._every_steps = every_steps
        self._clock_counts = rank == 0 and every_steps is None
        self._saved_at = time.monotonic()
        self._saved_step = -1
        self._in_flight: tuple[torch.Tensor, Any] | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked_to_stop = True

    def after_step(self, step: int) -> tuple[bool, bool]:
        """Return two values after ``step`` optimizer steps: True to stop now, and True to save now."""
        by_clock = self._clock_counts and time.monotonic() - self._saved_at >= self._every_seconds
        stop, save = self._agree(self.asked_to_stop, by_clock)
        if step - self._saved_step <= 1:
            save = False  # a request from before the last save
        if self._every_steps is not None:
            save = step % self._every_steps == 0
        return stop, save or stop

    def saved(self, step: int) -> None:
        self._saved_at, self._saved_step = time.monotonic(), step

    def _agree(self, stop: bool, save: bool) -> tuple[bool, bool]:
        if not dist.is_initialized():
            return stop, save
        arrived = self._in_flight
        requests = torch.tensor([stop, save], dtype=torch.int32)
        self._in_flight = requests, dist.all_reduce(requests, async_op=True)
        if arrived is None:
            return False, False
        arrived[1].wait()
        any_stop, any_save = arrived[0].tolist()
        return any_stop > 0, any_save > 0
