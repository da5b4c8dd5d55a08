"""The order in which W&B gets a run's rows, and which of them it has."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from largebatch.runs.metrics import Row
from largebatch.tracking.wandb_run import WandbRun

if TYPE_CHECKING:
    from largebatch.tracking.layers import LayerRow


class WandbFeed:
    """Hands a run's rows to W&B, each once, in the order of their steps.

    Layers' rows come late, so the rows after them wait. That makes one order, whenever layers are read: W&B's copy is
    always a number of first rows. A resumed part is given all rows from the first one on, and sends what W&B lacks.
    What still waits when a run fails or is killed isn't sent: it comes again when the run is resumed.

    Args:
        run: where rows go.
        epoch_steps: optimizer steps an epoch.
    """

    def __init__(self, run: WandbRun, epoch_steps: int) -> None:
        self._run = run
        self._epoch_steps = epoch_steps
        self._number = 0  # of rows so far
        self._waiting: deque[Row] = deque()
        self._awaited: deque[int] = deque()  # steps of the layers' rows that are still on the device

    def images(self, path: Path) -> None:
        """A file of images, as the first row."""
        if self._is_new():
            self._run.log({"step": 0, "epoch": 0}, images=path)

    def expect_layers(self, step: int) -> None:
        """A row of layers of this step will come; rows of this step and later ones come after it."""
        self._awaited.append(step)

    def row(self, row: Row) -> None:
        self._waiting.append(row)
        self._hand_on()

    def layers(self, row: LayerRow) -> None:
        """The oldest of the rows that are expected."""
        self._awaited.popleft()
        self._hand_on(before=row.step)
        if self._is_new():
            where = {"step": row.step, "epoch": row.step / self._epoch_steps}
            self._run.log(where | row.metrics(), histograms=row.columns())
        self._hand_on()

    def _hand_on(self, before: float = math.inf) -> None:
        """The rows that wait for no layers' row; those of a step come after its layers'."""
        until = min(before, self._awaited[0] if self._awaited else math.inf)
        while self._waiting and self._waiting[0]["step"] < until:
            row = self._waiting.popleft()
            if self._is_new():
                self._run.log(row)

    def _is_new(self) -> bool:
        """Count one more row: whether W&B lacks it."""
        self._number += 1
        return self._number > self._run.rows_before
