"""Time of training steps: their speed; and on request a trace, and a table of the time of each phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from largebatch.data.stream import DecodingTimes
from largebatch.machine.precision import synchronize
from largebatch.machine.process import seconds_alive
from largebatch.runs.folder import write_atomic
from largebatch.runs.table import plain_table

_WARM_UP = 3  # steps; they include allocations, the choice of convolution algorithms and compilation
_STEPS = 10
PHASES = ("data", "forward", "backward", "optimizer", "logging", "evaluation", "checkpoint")


class StepClock:
    """Wall time of a run over its interruptions, and the speed of its latest steps.

    Args:
        seconds_before: wall seconds of the run's earlier processes.
        device: the device to wait for before a pause, because a GPU's work is only queued.
        decoding: times of decoding images in this process.
    """

    def __init__(self, seconds_before: float, device: torch.device, decoding: DecodingTimes | None = None) -> None:
        self._device, self._decoding = device, decoding or DecodingTimes()
        self._started = time.perf_counter() - seconds_before
        self.restart()

    def restart(self) -> None:
        """Measure speed from now on, without atypical time such as the first step's set-up."""
        self._mark, self._paused, self._steps, self._images = time.perf_counter(), 0.0, 0, 0
        self._decoding.restart()

    def step(self, images: int) -> None:
        self._steps += 1
        self._images += images

    def elapsed(self) -> float:
        return time.perf_counter() - self._started

    def speed(self) -> dict[str, float]:
        """Return images per second and milliseconds per step since the last call; empty without a step.

        If images are decoded while training: also images per second that a decoding process decodes, and the part of
        the time in which this process waited for them.
        """
        if self._steps == 0:
            return {}
        seconds = time.perf_counter() - self._mark - self._paused
        speed = {"perf/images_per_second": self._images / seconds, "perf/step_ms": 1000 * seconds / self._steps}
        decoding = self._decoding
        if decoding.images:
            speed["perf/decoded_images_per_second"] = decoding.images / decoding.seconds
            speed["perf/data_share"] = decoding.waited / seconds
        self.restart()
        return speed

    @contextmanager
    def paused(self) -> Iterator[None]:
        synchronize(self._device)
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start


class StartClock:
    """Seconds of each part of a process's start.

    Attributes:
        seconds: seconds of each part, in order; the first begins with the process.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._ended = 0.0

    def end(self, part: str) -> None:
        """End ``part``, which began when the part before it ended."""
        before, self._ended = self._ended, seconds_alive()
        self.seconds[part] = round(self._ended - before, 2)

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.seconds.items())
        return f"start {sum(self.seconds.values()):.1f} s: {parts}"


class Profile:
    """Profile of ten steps after three warm-up steps, or of fewer in a short run.

    Writes ``trace.json.gz`` (for Perfetto, chrome://tracing) and ``shares.txt`` to ``folder``. Each profiled phase
    ends with a wait for the device, so that its time includes only its own work. This makes the profiled steps slower.

    Args:
        folder: folder of the two files; None: no profile.
    """

    def __init__(self, folder: Path | None, device: torch.device) -> None:
        self._folder, self._device = folder, device
        self._profiler: Any = None
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._begun = 0  # steps since the start of the process
        self._started = 0.0

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Return a context that adds its time to ``name``, one of ``PHASES``."""
        return nullcontext() if self._profiler is None else self._measured(name)

    @contextmanager
    def _measured(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        with torch.profiler.record_function(name):
            yield
            synchronize(self._device)
        self._seconds[name] += time.perf_counter() - start

    def before_step(self) -> None:
        self._begun += 1
        if self._folder is not None and self._begun == _WARM_UP + 1:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
            synchronize(self._device)
            self._started = time.perf_counter()

    def after_step(self, is_last: bool) -> list[str]:
        """Return the table and the trace's path as lines for the log after the last profiled step, else no lines.

        Args:
            is_last: True for the run's last step.
        """
        profiled = self._begun - _WARM_UP
        if self._profiler is None or (profiled < _STEPS and not is_last):
            return []
        synchronize(self._device)
        total = time.perf_counter() - self._started
        self._profiler.stop()
        assert self._folder is not None
        self._folder.mkdir(exist_ok=True)
        self._profiler.export_chrome_trace(str(self._folder / "trace.json.gz"))
        self._profiler = None
        table = self._table(total, profiled)
        write_atomic(self._folder / "shares.txt", table + "\n")
        return [f"profiled {profiled} step(s); trace in {self._folder / 'trace.json.gz'}", *table.splitlines()]

    def _table(self, total: float, steps: int) -> str:
        seconds = self._seconds | {"other": total - sum(self._seconds.values()), "all": total}
        rows = [(name, f"{1000 * spent / steps:.2f}", f"{spent / total:.1%}") for name, spent in seconds.items()]
        return plain_table(("phase", "ms a step", "share"), rows)
