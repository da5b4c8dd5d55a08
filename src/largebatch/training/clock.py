"""Time of a run, and speed of its steps without evaluations."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepClock:
    """Wall time of a run over its interruptions, and the speed of its latest steps.

    Args:
        seconds_before: wall seconds of the run's earlier processes.
        device: the device to wait for before a pause, because a GPU's work is only queued.
    """

    def __init__(self, seconds_before: float, device: torch.device) -> None:
        self._device = device
        self._started = time.perf_counter() - seconds_before
        self.restart()

    def restart(self) -> None:
        """Measure speed from now on, without atypical time such as the first step's set-up."""
        self._mark, self._paused, self._steps, self._images = time.perf_counter(), 0.0, 0, 0

    def step(self, images: int) -> None:
        self._steps += 1
        self._images += images

    def elapsed(self) -> float:
        return time.perf_counter() - self._started

    def speed(self) -> dict[str, float]:
        """Return images per second and milliseconds per step since the last call; empty without a step."""
        if self._steps == 0:
            return {}
        seconds = time.perf_counter() - self._mark - self._paused
        speed = {"perf/images_per_second": self._images / seconds, "perf/step_ms": 1000 * seconds / self._steps}
        self.restart()
        return speed

    @contextmanager
    def paused(self) -> Iterator[None]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start
