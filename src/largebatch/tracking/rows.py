"""Order and numbers of a run's rows in W&B, shared by the live run and a replay of its files.

Imports no torch: ``largebatch sync`` and the launcher use it.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from largebatch.runs.folder import RunFolder
from largebatch.runs.metrics import Row, read_rows

if TYPE_CHECKING:
    import pyarrow

COLUMNS = ("weight_norm", "gradient_norm", "trust_ratio")
_LAYER_ROWS_IN_WANDB = 1000  # most layer rows of a run: 44 MB with 100 layers, and charts sample from more anyway


class LayerRow(NamedTuple):
    """Statistics after optimizer step ``step``: for each of ``COLUMNS`` one value a layer, in the order of names."""

    step: int
    names: list[str]
    values: list[list[float]]

    def metrics(self) -> dict[str, float]:
        """Return ``{"layers/weight_norm/conv1.weight": 0.7, ...}``."""
        return {
            f"layers/{column}/{name}": value
            for column, values in zip(COLUMNS, self.values, strict=True)
            for name, value in zip(self.names, values, strict=True)
        }

    def columns(self) -> dict[str, list[float]]:
        """Return ``{"layers/weight_norm": [0.7, ...], ...}``."""
        return {f"layers/{column}": values for column, values in zip(COLUMNS, self.values, strict=True)}


class RowOrder:
    """Number a run's rows from 0 and log them in the order of their steps.

    Row 0 is the image grid, if there is one. The layer row of a step comes before the step's other rows. Layer rows
    arrive late, so later rows wait for them. The order is therefore the same whenever layers are read, and a replay
    from row 0 gives each row its old number: wandb drops the numbers that it has.

    Rows that still wait when a run fails or is killed are not logged; the resumed run logs them.

    Args:
        log: called as ``log(number, row, histograms=..., images=...)``.
        layers_every: ``tracker.layers_every``; W&B gets layer rows at a multiple of it in a long run.
        steps: optimizer steps of the run.
        steps_per_epoch: optimizer steps per epoch, maybe a fraction.

    Attributes:
        count: number of rows so far.
        layers_every: steps between the layer rows that W&B gets; 0 without layer rows.
    """

    def __init__(self, log: Callable[..., None], layers_every: int, steps: int, steps_per_epoch: float) -> None:
        self.count = 0
        self.layers_every = layers_every * math.ceil(steps / max(layers_every, 1) / _LAYER_ROWS_IN_WANDB)
        self._log = log
        self._steps_per_epoch = steps_per_epoch
        self._waiting: deque[Row] = deque()
        self._awaited: deque[int] = deque()  # steps of layer rows that are still on the device

    def expect_layers(self, step: int) -> None:
        """Let rows of this step and later steps wait for the layer row of this step."""
        if step % self.layers_every == 0:
            self._awaited.append(step)

    def row(self, row: Row) -> None:
        """Add the next row of metrics."""
        self._waiting.append(row)
        self._release()

    def layers(self, row: LayerRow) -> None:
        """Add the oldest layer row that is expected; rows that were not expected are dropped."""
        if row.step % self.layers_every == 0:
            self._awaited.popleft()
            self._release(before=row.step)
            place = {"step": row.step, "epoch": row.step / self._steps_per_epoch}
            self._next(place | row.metrics(), histograms=row.columns())
            self._release()

    def _release(self, before: float = math.inf) -> None:
        """Log the rows before the next expected layer row."""
        end = min(before, self._awaited[0] if self._awaited else math.inf)
        while self._waiting and self._waiting[0]["step"] < end:
            self._next(self._waiting.popleft())

    def _next(self, row: Row, histograms: dict[str, list[float]] | None = None, images: Path | None = None) -> None:
        self._log(self.count, row, histograms=histograms, images=images)
        self.count += 1


def replay(folder: RunFolder, order: RowOrder, step: int = sys.maxsize, is_over: bool = True) -> None:
    """Pass the rows in a run's files to ``order``: ``images.png``, ``metrics.jsonl`` and ``layers.parquet``.

    Args:
        folder: the run folder.
        order: receives the rows.
        step: last step whose layer rows count.
        is_over: False for a run that may be resumed. ``layers.parquet`` then ends at the last checkpoint, so rows
            after its next layer row have no known number and are left out.
    """
    if folder.images.exists():
        order._next({"step": 0, "epoch": 0}, images=folder.images)
    table = read_layer_table(folder.layers, step) if order.layers_every else None
    layers = _layer_rows(table, order.layers_every) if table else []
    for layer_row in layers:
        order.expect_layers(layer_row.step)
    if order.layers_every and not is_over:
        order.expect_layers((layers[-1].step if layers else 0) + order.layers_every)
    for row in read_rows(folder.metrics):
        order.row(row)
    for layer_row in layers:
        order.layers(layer_row)


def read_layer_table(path: Path, step: int) -> pyarrow.Table | None:
    """Return ``layers.parquet`` up to ``step``, or None without such rows."""
    if not path.exists():
        return None
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path, filters=[("step", "<=", step)])
    return table if table.num_rows else None


def _layer_rows(table: pyarrow.Table, every: int) -> list[LayerRow]:
    """Return the rows of the steps that ``every`` divides."""
    table = table.filter(table["step"].to_numpy() % every == 0)  # first, because a table may have a million rows
    steps, names, *columns = (table[column].to_pylist() for column in ("step", "layer", *COLUMNS))
    rows = []
    for step, entries in itertools.groupby(range(len(steps)), key=steps.__getitem__):
        indices = list(entries)
        rows.append(LayerRow(step, [names[i] for i in indices], [[column[i] for i in indices] for column in columns]))
    return rows
