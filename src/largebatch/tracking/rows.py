"""Order and numbers of a run's rows in a tracker, shared by the live run and a replay of its files.

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

from largebatch.runs.folder import RunFolder, readable
from largebatch.runs.metrics import Row, read_rows

if TYPE_CHECKING:
    import pyarrow

COLUMNS = ("weight_norm", "gradient_norm", "trust_ratio", "update_ratio")
# The first steps decide whether a large batch trains, so they have rows of their own.
EARLY_ROWS = 20  # each of the first steps has a row of metrics
EARLY_LAYER_ROWS = (1, 2, 5, 10)  # steps with a layer row
_LAYER_ROWS_IN_WANDB = 1000  # most later layer rows of a run: 44 MB with 100 layers, and charts sample from more anyway


def has_metrics_row(step: int, log_every: int) -> bool:
    """Return True if training writes a row of metrics after this step."""
    return step <= EARLY_ROWS or step % log_every == 0


def has_layer_row(step: int, layers_every: int) -> bool:
    """Return True if this step has a layer row: never with ``layers_every=0``."""
    return layers_every > 0 and (step in EARLY_LAYER_ROWS or step % layers_every == 0)


class Layer(NamedTuple):
    """A parameter tensor. Biases and norm scales have one dimension."""

    name: str
    dimensions: int


class LayerRow(NamedTuple):
    """Statistics that update ``step`` used: for each of ``COLUMNS`` one value a layer, in the order of layers."""

    step: int
    layers: list[Layer]
    values: list[list[float]]

    def metrics(self) -> dict[str, float]:
        """Return ``{"layers/weight_norm/conv1.weight": 0.7, ...}``."""
        return {
            f"layers/{column}/{layer.name}": value
            for column, values in zip(COLUMNS, self.values, strict=True)
            for layer, value in zip(self.layers, values, strict=True)
        }

    def columns(self) -> dict[str, list[float]]:
        """Return ``{"layers/weight_norm": [0.7, ...], ...}``, without parameters of one dimension."""
        return {
            f"layers/{column}": [v for layer, v in zip(self.layers, values, strict=True) if layer.dimensions > 1]
            for column, values in zip(COLUMNS, self.values, strict=True)
        }


class Media(NamedTuple):
    """Parts of a row beside its numbers: values to show as histograms, an image file, and a file of predictions."""

    histograms: dict[str, list[float]]
    images: Path | None = None
    predictions: Path | None = None


NO_MEDIA = Media({})


class RowOrder:
    """Number a run's rows from 0 and log them in the order of their steps.

    Row 0 is the image grid, if there is one, and the last row the predictions. The layer row of a step comes before the
    step's other rows. Layer rows arrive late, so later rows wait for them. A layer row waits until a row of its step
    or a later step follows: a run that diverges writes the rows of several steps at once. The order is therefore the
    same whenever layers are read, and a replay from row 0 gives each row its old number: wandb drops the numbers that
    it has.

    Rows that still wait when a run fails or is killed are not logged; the resumed run logs them.

    Args:
        log: called as ``log(number, row, media)``.
        layers_every: ``tracker.layers_every``; W&B gets layer rows at a multiple of it in a long run.
        steps: optimizer steps of the run.

    Attributes:
        count: number of rows so far.
        layers_every: steps between the layer rows that W&B gets; 0 without layer rows.
    """

    def __init__(self, log: Callable[[int, Row, Media], None], layers_every: int, steps: int) -> None:
        self.count = 0
        self.layers_every = layers_every * math.ceil(steps / max(layers_every, 1) / _LAYER_ROWS_IN_WANDB)
        self._log = log
        self._last: Row = {"step": 0, "epoch": 0}
        self._waiting: deque[Row] = deque()
        self._awaited: deque[int] = deque()  # steps of layer rows that aren't logged yet
        self._arrived: deque[LayerRow] = deque()  # the oldest of them, which have left the device

    def expect_layers(self, step: int) -> None:
        """Let rows of this step and later steps wait for the layer row of this step."""
        if has_layer_row(step, self.layers_every):
            self._awaited.append(step)

    def row(self, row: Row) -> None:
        """Add the next row of metrics."""
        self._waiting.append(row)
        self._release()

    def layers(self, row: LayerRow) -> None:
        """Add the oldest layer row that is expected; rows that were not expected are dropped."""
        if has_layer_row(row.step, self.layers_every):
            self._arrived.append(row)
            self._release()

    def end(self, predictions: Path) -> None:
        """Log the final predictions after all other rows."""
        self._next({name: self._last[name] for name in ("step", "epoch")}, Media({}, predictions=predictions))

    def _release(self) -> None:
        """Log the rows before the next layer row that has not arrived."""
        while self._waiting:
            if not self._awaited or self._waiting[0]["step"] < self._awaited[0]:
                self._next(self._waiting.popleft())
            elif self._arrived:
                layers = self._arrived.popleft()
                step = self._awaited.popleft()
                self._next(self._place(step) | layers.metrics(), Media(layers.columns()))
            else:
                break

    def _place(self, step: int) -> Row:
        """Return the step and epoch of a layer row: between the row before and the next row, which has the epoch."""
        last, coming = self._last, self._waiting[0]
        part = (step - last["step"]) / (coming["step"] - last["step"])
        return {"step": step, "epoch": last["epoch"] * (1 - part) + coming["epoch"] * part}

    def _next(self, row: Row, media: Media = NO_MEDIA) -> None:
        self._log(self.count, row, media)
        self._last = row
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
        order._next({"step": 0, "epoch": 0}, Media({}, images=folder.images))
    table = read_layer_table(folder.layers, step) if order.layers_every else None
    layers = _layer_rows(table, order.layers_every) if table else []
    for layer_row in layers:
        order.expect_layers(layer_row.step)
    if order.layers_every and not is_over:
        last = layers[-1].step if layers else 0
        regular = (last // order.layers_every + 1) * order.layers_every
        order.expect_layers(min([step for step in EARLY_LAYER_ROWS if step > last] + [regular]))
    for row in read_rows(folder.metrics):
        order.row(row)
    for layer_row in layers:
        order.layers(layer_row)


def read_layer_table(path: Path, step: int) -> pyarrow.Table | None:
    """Return ``layers.parquet`` up to ``step``, or None without such rows.

    Raises:
        UserError: the file can't be read.
    """
    if not path.exists():
        return None
    import pyarrow.parquet

    with readable(path):
        names = ["step", "layer", "dimensions", *COLUMNS]
        table = pyarrow.parquet.read_table(path, columns=names, filters=[("step", "<=", step)])
        table.validate(full=True)
    return table if table.num_rows else None


def _layer_rows(table: pyarrow.Table, every: int) -> list[LayerRow]:
    """Return the rows of the steps that have a layer row in W&B."""
    import pyarrow.compute

    wanted = [step for step in table["step"].unique().to_pylist() if has_layer_row(step, every)]
    # First, because a table may have a million rows.
    table = table.filter(pyarrow.compute.field("step").isin(pyarrow.array(wanted, pyarrow.int64())))
    steps, names, dimensions, *columns = (
        table[column].to_pylist() for column in ("step", "layer", "dimensions", *COLUMNS)
    )
    rows = []
    for step, entries in itertools.groupby(range(len(steps)), key=steps.__getitem__):
        indices = list(entries)
        layers = [Layer(names[i], dimensions[i]) for i in indices]
        rows.append(LayerRow(step, layers, [[column[i] for i in indices] for column in columns]))
    return rows
