"""``layers.parquet``: weight norm, gradient norm and trust ratio of every layer, every so many steps.

Reading a figure waits for the device, so rows gather there and are read together.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import pyarrow

COLUMNS = ("weight_norm", "gradient_norm", "trust_ratio")
CAPACITY = 32  # rows on the device: 20 kB for ResNet-50, and one wait in 640 steps at the default rate


class LayerRow(NamedTuple):
    """Statistics after optimizer step ``step``: for each of ``COLUMNS`` one figure a layer, in the order of names."""

    step: int
    names: list[str]
    figures: list[list[float]]

    def metrics(self) -> dict[str, float]:
        """As ``{"layers/weight_norm/conv1.weight": 0.7, ...}``."""
        return {
            f"layers/{column}/{name}": figure
            for column, figures in zip(COLUMNS, self.figures, strict=True)
            for name, figure in zip(self.names, figures, strict=True)
        }

    def columns(self) -> dict[str, list[float]]:
        """As ``{"layers/weight_norm": [0.7, ...], ...}``."""
        return {f"layers/{column}": figures for column, figures in zip(COLUMNS, self.figures, strict=True)}


class LayerLog:
    """Collects statistics on the device and writes them when asked, with the rows of an earlier part of the run.

    Args:
        path: the Parquet file; its rows up to ``step`` are kept.
        step: the optimizer step that the run continues from.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self._tables = _read(path, step)  # what left the device; not as Python objects, for it can be a million rows
        self._names: list[str] = []
        # Of shape [CAPACITY, columns, layers] once there is a row; the first of them are those of _steps.
        self._buffer = torch.empty(0)
        self._steps: list[int] = []

    def add(self, step: int, names: list[str], statistics: dict[str, Tensor]) -> list[LayerRow]:
        """Keep a tensor of shape [layers] for each of ``COLUMNS``, with one operation on its device and no wait.

        Returns:
            The rows that left the device on this occasion: usually none.
        """
        if not names:  # an optimizer may have been told to adapt none
            return []
        columns = [statistics[column].detach() for column in COLUMNS]
        left = []
        if names != self._names:
            left = self._read_back()
            self._names = list(names)
            shape = (CAPACITY, len(COLUMNS), len(names))
            self._buffer = torch.empty(shape, dtype=torch.float32, device=columns[0].device)
        torch.stack(columns, out=self._buffer[len(self._steps)])
        self._steps.append(step)
        return left + self._read_back() if len(self._steps) == CAPACITY else left

    def rows_from_before(self, every: int) -> list[LayerRow]:
        """The rows of an earlier part of the run, of the steps that ``every`` divides."""
        if not self._tables:
            return []
        table = self._tables[0]
        table = table.filter(table["step"].to_numpy() % every == 0)
        steps, names, *columns = (table[column].to_pylist() for column in ("step", "layer", *COLUMNS))
        rows = []
        for step, entries in itertools.groupby(range(len(steps)), key=steps.__getitem__):
            which = list(entries)
            rows.append(LayerRow(step, [names[i] for i in which], [[values[i] for i in which] for values in columns]))
        return rows

    def to_write(self) -> tuple[list[LayerRow], Callable[[], None]]:
        """The rows that now left the device, and what brings the file up to date with all so far, in any thread."""
        left = self._read_back()
        return left, partial(_write, list(self._tables), self._path)

    def write(self) -> list[LayerRow]:
        """Bring the file up to date. Returns the rows that left the device for it."""
        left, write = self.to_write()
        write()
        return left

    def _read_back(self) -> list[LayerRow]:
        """Empty the buffer, with one copy."""
        figures = self._buffer[: len(self._steps)].tolist()
        rows = [LayerRow(step, self._names, row) for step, row in zip(self._steps, figures, strict=True)]
        self._steps = []
        if rows:
            self._tables.append(_table(rows))
        return rows


def _write(tables: list[pyarrow.Table], path: Path) -> None:
    if tables:
        import pyarrow
        import pyarrow.parquet

        temporary = path.with_name(f".{path.name}.tmp")
        pyarrow.parquet.write_table(pyarrow.concat_tables(tables), temporary)
        os.replace(temporary, path)


def _table(rows: list[LayerRow]) -> pyarrow.Table:
    """One row a step and layer."""
    import pyarrow

    columns = {
        "step": [row.step for row in rows for _ in row.names],
        "layer": [name for row in rows for name in row.names],
        **{column: [f for row in rows for f in row.figures[i]] for i, column in enumerate(COLUMNS)},
    }
    return pyarrow.table(columns)


def _read(path: Path, step: int) -> list[pyarrow.Table]:
    """The table of a file, without the rows after ``step``: none where there is no file, or no row is left."""
    if not path.exists():
        return []
    import pyarrow.compute
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    table = table.filter(pyarrow.compute.less_equal(table["step"], step))
    return [table] if table.num_rows else []


def plain_statistics(model: nn.Module) -> tuple[list[str], dict[str, Tensor]]:
    """Names and statistics of the layers of a model whose optimizer keeps none, taken before its step.

    An optimizer without layer-wise scaling has trust ratio 1. The ratio that the TVLARS paper calls LNR is
    ``weight_norm / gradient_norm`` for every optimizer.
    """
    layers = [(n, p.detach(), p.grad) for n, p in model.named_parameters() if p.grad is not None and p.ndim > 1]
    weights = torch.stack(torch._foreach_norm([weight for _, weight, _ in layers]))
    gradients = torch.stack(torch._foreach_norm([gradient for _, _, gradient in layers]))
    statistics = {"weight_norm": weights, "gradient_norm": gradients, "trust_ratio": torch.ones_like(weights)}
    return [name for name, _, _ in layers], statistics
