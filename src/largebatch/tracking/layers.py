"""``layers.parquet``: weight norm, gradient norm and trust ratio of every layer, every so many steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.tracking.metrics import write_table

COLUMNS = ("weight_norm", "gradient_norm", "trust_ratio")


class LayerLog:
    """Collects statistics on the device and writes them when asked, with the rows of an earlier part of the run.

    Args:
        path: the Parquet file; its rows up to ``step`` are kept.
        step: the optimizer step that the run continues from.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self._rows: list[dict[str, Any]] = [row for row in _read(path) if row["step"] <= step]
        self._on_device: list[tuple[int, list[str], Tensor]] = []

    def add(self, step: int, names: list[str], statistics: dict[str, Tensor]) -> None:
        """Statistics after optimizer step ``step``: a tensor of shape [layers] for each of ``COLUMNS``."""
        self._on_device.append((step, names, torch.stack([statistics[c].detach().float() for c in COLUMNS])))

    def write(self) -> None:
        for step, names, values in self._on_device:
            for name, *figures in zip(names, *values.tolist(), strict=True):
                self._rows.append({"step": step, "layer": name, **dict(zip(COLUMNS, figures, strict=True))})
        self._on_device.clear()
        if self._rows:
            write_table(self._rows, self._path)


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


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    import pyarrow.parquet

    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows
