"""Agreement of all processes on the steps at which to save and stop, and the early end of a training."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Collection
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from largebatch.machine import distributed


class StepBoundary:
    """Decision after each optimizer step to save or to stop, the same in every process.

    SIGINT, SIGTERM and SIGUSR2 (from SLURM before a time limit) request a stop. The clock of rank 0, or the step count,
    requests a checkpoint. Several processes sum their requests in the background during the next step, so that no step
    waits. Requests therefore take effect one step later.

    Args:
        every_seconds, every_steps: the keys of ``checkpoint``.
        always: steps after which to save in any case.
    """

    def __init__(
        self, every_seconds: float, every_steps: int | None, rank: int, always: Collection[int] = frozenset()
    ) -> None:
        self.asked_to_stop = False
        self._always = always
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
        return stop, save or stop or step in self._always

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


@dataclass
class EarlyStopping:
    """Decision to end the training because validation accuracy no longer rises (``early_stopping``).

    Attributes:
        patience: evaluations without a better accuracy after which the training ends. None: it never ends early.
        best: best validation accuracy so far.
        waited: evaluations since the best.
    """

    patience: int | None
    best: float = -math.inf
    waited: int = 0

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Count an evaluation, the same in every process. Only a higher accuracy than the best is better."""
        if self.patience is not None:
            better = distributed.from_rank_0(metrics["val/accuracy"] > self.best)
            self.best, self.waited = (metrics["val/accuracy"], 0) if better else (self.best, self.waited + 1)

    @property
    def stops(self) -> bool:
        """True if the training ends at this step."""
        return self.patience is not None and self.waited >= self.patience

    @property
    def reason(self) -> str:
        """The reason for the end, for status and log; empty if the training doesn't end here."""
        last = "the last evaluation" if self.patience == 1 else f"the last {self.patience} evaluations"
        return f"stopped early: val/accuracy wasn't higher in {last}" if self.stops else ""

    def state(self) -> dict[str, float]:
        return {"best": self.best, "waited": self.waited}

    def load(self, saved: dict[str, float]) -> None:
        self.best, self.waited = saved["best"], int(saved["waited"])
