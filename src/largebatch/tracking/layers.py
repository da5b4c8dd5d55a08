"""``layers.parquet``: weight norm, gradient norm, trust ratio and update ratio of every parameter tensor.

It has rows for some of the first steps, and then every ``tracker.layers_every`` steps.

Reading a value waits for the device, so rows gather on the device and are read together.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from largebatch.errors import UserError
from largebatch.runs.folder import replace_file
from largebatch.tracking.rows import COLUMNS, Layer, LayerRow, read_layer_table

if TYPE_CHECKING:
    import pyarrow

CAPACITY = 32  # rows on the device: 62 kB for ResNet-50, and one wait in 640 steps at the default layers_every


class LayerLog:
    """Collect statistics on the device and write them on request, after the rows of an earlier part of the run.

    Args:
        path: the Parquet file; its rows up to ``step`` are kept.
        step: the optimizer step that the run continues from.
        left: called with each row that leaves the device.
    """

    def __init__(self, path: Path, step: int, left: Callable[[LayerRow], object]) -> None:
        self._path, self._left = path, left
        kept = read_layer_table(path, step) if step > 0 else None
        if step == 0:
            path.unlink(missing_ok=True)
        # Rows that left the device. Not as Python objects, because there may be a million.
        self._tables: list[pyarrow.Table] = [] if kept is None else [kept]
        self._digest = digest(self._tables)
        self._layers: list[Layer] = []
        # Shape [CAPACITY, columns, layers] once there is a row; row i is of step _steps[i].
        self._buffer = torch.empty(0)
        self._steps: list[int] = []

    def add(self, step: int, layers: list[Layer], statistics: dict[str, Tensor]) -> None:
        """Keep a tensor of shape [layers] for each of ``COLUMNS``, with one operation on its device and no wait."""
        if not layers:
            return
        columns = [statistics[column].detach() for column in COLUMNS]
        if layers != self._layers:
            self._read_back()
            self._layers = list(layers)
            shape = (CAPACITY, len(COLUMNS), len(layers))
            self._buffer = torch.empty(shape, dtype=torch.float32, device=columns[0].device)
        torch.stack(columns, out=self._buffer[len(self._steps)])
        self._steps.append(step)
        if len(self._steps) == CAPACITY:
            self._read_back()

    def to_write(self) -> Callable[[], list[int]]:
        """Return a function that writes all rows so far, in any thread, and returns their ``digest``."""
        self._read_back()
        tables, described = list(self._tables), list(self._digest)

        def write() -> list[int]:
            _write(tables, self._path)
            return described

        return write

    def _read_back(self) -> None:
        """Empty the buffer, with one copy."""
        values = self._buffer[: len(self._steps)].tolist()
        rows = [LayerRow(step, self._layers, row) for step, row in zip(self._steps, values, strict=True)]
        self._steps = []
        if rows:
            import pyarrow

            columns = {
                "step": [row.step for row in rows for _ in row.layers],
                "layer": [layer.name for row in rows for layer in row.layers],
                "dimensions": [layer.dimensions for row in rows for layer in row.layers],
                **{column: [value for row in rows for value in row.values[i]] for i, column in enumerate(COLUMNS)},
            }
            self._tables.append(pyarrow.table(columns))
            self._digest = digest(self._tables[-1:], self._digest)
        for row in rows:
            self._left(row)


def digest(tables: Sequence[pyarrow.Table], before: Sequence[int] = ()) -> list[int]:
    """Return the number of rows and the CRC-32 of each column, after the rows of the digest ``before``."""
    rows, *crcs = before or [0] * (1 + 3 + len(COLUMNS))
    for table in tables:
        rows += table.num_rows
        for number, column in enumerate(table.columns):
            for chunk in column.chunks:
                content = "\0".join([*chunk.to_pylist(), ""]).encode() if number == 1 else chunk.to_numpy().tobytes()
                crcs[number] = zlib.crc32(content, crcs[number])
    return [rows, *crcs]


def has_rows(path: Path, step: int, described: list[int]) -> bool:
    """Return True if the file's rows up to ``step`` are those of a digest."""
    try:
        table = read_layer_table(path, step)
        return digest([] if table is None else [table]) == described
    except (OSError, UserError):
        return False


def _write(tables: list[pyarrow.Table], path: Path) -> None:
    if tables:
        import pyarrow
        import pyarrow.parquet

        replace_file(path, partial(pyarrow.parquet.write_table, pyarrow.concat_tables(tables)))


def plain_statistics(model: nn.Module, without: Collection[Tensor] = ()) -> tuple[list[Layer], dict[str, Tensor]]:
    """Return the model's parameters with a gradient, and their statistics. Call it before the step.

    The trust ratio is 1: no optimizer scales these parameters. The ratio that the TVLARS paper calls LNR is
    ``weight_norm / gradient_norm`` for every optimizer.

    Args:
        model: the model.
        without: parameters to leave out, because the optimizer measures them itself.
    """
    skipped = set(map(id, without))
    found = [
        (n, p.detach(), p.grad) for n, p in model.named_parameters() if p.grad is not None and id(p) not in skipped
    ]
    if not found:
        return [], {column: torch.empty(0, device=next(model.parameters()).device) for column in COLUMNS[:3]}
    weights = torch.stack(torch._foreach_norm([weight for _, weight, _ in found]))
    gradients = torch.stack(torch._foreach_norm([gradient for _, _, gradient in found]))
    statistics = {"weight_norm": weights, "gradient_norm": gradients, "trust_ratio": torch.ones_like(weights)}
    return [Layer(name, weight.ndim) for name, weight, _ in found], statistics


def update_ratios(model: nn.Module, before: list[Tensor], layers: list[Layer], weight_norms: Tensor) -> Tensor:
    """Return the norm of a step's change of each layer over its weight norm, float32 [layers]. Call it after the step.

    0 if the weight was zero.

    Args:
        model: the model.
        before: its parameters before the step.
        layers: the layers, in the order of ``weight_norms``.
        weight_norms: norms before the step, shape [layers].
    """
    changes = torch._foreach_sub([parameter.detach() for parameter in model.parameters()], before)
    norms = dict(zip((name for name, _ in model.named_parameters()), torch._foreach_norm(changes), strict=True))
    ratios = torch.stack([norms[layer.name] for layer in layers]) / weight_norms
    return ratios.where(weight_norms > 0, 0.0)
