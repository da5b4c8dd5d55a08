"""``layers.parquet``: weight norm, gradient norm and trust ratio of every layer, every ``tracker.layers_every`` steps.

Reading a value waits for the device, so rows gather on the device and are read together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from largebatch.runs.folder import replace_file
from largebatch.tracking.rows import COLUMNS, LayerRow, read_layer_table

if TYPE_CHECKING:
    import pyarrow

CAPACITY = 32  # rows on the device: 20 kB for ResNet-50, and one wait in 640 steps at the default layers_every


class LayerLog:
    """Collect statistics on the device and write them on request, after the rows of an earlier part of the run.

    Args:
        path: the Parquet file; its rows up to ``step`` are kept.
        step: the optimizer step that the run continues from.
        left: called with each row that leaves the device.
    """

    def __init__(self, path: Path, step: int, left: Callable[[LayerRow], object]) -> None:
        self._path, self._left = path, left
        kept = read_layer_table(path, step)
        # Rows that left the device. Not as Python objects, because there may be a million.
        self._tables: list[pyarrow.Table] = [] if kept is None else [kept]
        self._names: list[str] = []
        # Shape [CAPACITY, columns, layers] once there is a row; row i is of step _steps[i].
        self._buffer = torch.empty(0)
        self._steps: list[int] = []

    def add(self, step: int, names: list[str], statistics: dict[str, Tensor]) -> None:
        """Keep a tensor of shape [layers] for each of ``COLUMNS``, with one operation on its device and no wait."""
        if not names:  # the optimizer may be configured to adapt no layer
            return
        columns = [statistics[column].detach() for column in COLUMNS]
        if names != self._names:
            self._read_back()
            self._names = list(names)
            shape = (CAPACITY, len(COLUMNS), len(names))
            self._buffer = torch.empty(shape, dtype=torch.float32, device=columns[0].device)
        torch.stack(columns, out=self._buffer[len(self._steps)])
        self._steps.append(step)
        if len(self._steps) == CAPACITY:
            self._read_back()

    def to_write(self) -> Callable[[], None]:
        """Return a function that writes all rows so far, in any thread."""
        self._read_back()
        return partial(_write, list(self._tables), self._path)

    def _read_back(self) -> None:
        """Empty the buffer, with one copy."""
        values = self._buffer[: len(self._steps)].tolist()
        rows = [LayerRow(step, self._names, row) for step, row in zip(self._steps, values, strict=True)]
        self._steps = []
        if rows:
            import pyarrow

            columns = {
                "step": [row.step for row in rows for _ in row.names],
                "layer": [name for row in rows for name in row.names],
                **{column: [value for row in rows for value in row.values[i]] for i, column in enumerate(COLUMNS)},
            }
            self._tables.append(pyarrow.table(columns))
        for row in rows:
            self._left(row)


def _write(tables: list[pyarrow.Table], path: Path) -> None:
    if tables:
        import pyarrow
        import pyarrow.parquet

        replace_file(path, partial(pyarrow.parquet.write_table, pyarrow.concat_tables(tables)))


def plain_statistics(model: nn.Module) -> tuple[list[str], dict[str, Tensor]]:
    """Return names and statistics of a model's layers, for an optimizer that keeps none. Call it before the step.

    An optimizer without layer-wise scaling has trust ratio 1. The ratio that the TVLARS paper calls LNR is
    ``weight_norm / gradient_norm`` for every optimizer.
    """
    layers = [(n, p.detach(), p.grad) for n, p in model.named_parameters() if p.grad is not None and p.ndim > 1]
    weights = torch.stack(torch._foreach_norm([weight for _, weight, _ in layers]))
    gradients = torch.stack(torch._foreach_norm([gradient for _, _, gradient in layers]))
    statistics = {"weight_norm": weights, "gradient_norm": gradients, "trust_ratio": torch.ones_like(weights)}
    return [name for name, _, _ in layers], statistics
