"""Rows that W&B should have of a run, from the files of its folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow.parquet
from runs import TIMES

from largebatch.runs.metrics import read_rows
from largebatch.tracking.rows import COLUMNS

Row = dict[str, Any]


def local_rows(run: Path, steps_per_epoch: int) -> list[Row]:
    """Return the rows of ``metrics.jsonl`` and ``layers.parquet``, a step's layer row first, without times.

    Times of a step that ran twice differ.
    """
    layers: dict[int, Row] = {}
    table = run / "layers.parquet"
    for entry in pyarrow.parquet.read_table(table).to_pylist() if table.exists() else []:
        row = layers.setdefault(entry["step"], {"step": entry["step"], "epoch": entry["step"] / steps_per_epoch})
        row.update({f"layers/{column}/{entry['layer']}": entry[column] for column in COLUMNS})
    rows = [*layers.values(), *read_rows(run / "metrics.jsonl")]
    return [timeless(row) for row in sorted(rows, key=lambda row: row["step"])]


def timeless(row: Row) -> Row:
    """Return a row without times, histograms and values that W&B lacks."""
    kept = {k: v for k, v in row.items() if k not in TIMES and v is not None and not isinstance(v, dict)}
    return {k: v for k, v in kept.items() if not (isinstance(v, float) and math.isnan(v))}
