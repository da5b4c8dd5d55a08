"""Comparison of two folders of one run: equal bits, equal files, nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from runs import timeless

TIMES = ("seconds", "started", "ended", "updated", "queued", "pid", "host", "images_per_second", "memory", "step_ms")


def without_times(value: Any) -> Any:
    """Drop measured times, however deep. Tensors become types, shapes and bytes."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not any(time in str(k) for time in TIMES)}
    if isinstance(value, list | tuple):
        return [without_times(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    return value


def content(path: Path) -> Any:
    """Return what a file of a run folder holds, without times."""
    if path.suffix == ".json":
        return without_times(json.loads(path.read_text()))
    if path.suffix == ".parquet":
        table = pyarrow.parquet.read_table(path)
        return table.drop([name for name in table.column_names if any(time in name for time in TIMES)]).to_pylist()
    if path.suffix == ".pt":
        return without_times(torch.load(path, weights_only=True, map_location="cpu"))
    return path.read_bytes().replace(bytes(path.parents[2]), b"FOLDER")  # absolute paths in config.yaml


def assert_same_run(run: Path, whole: Path) -> None:
    """Compare all files of two run folders, and what they are: nothing is missing, nothing is left behind."""
    files = {path.relative_to(whole) for path in whole.rglob("*")}
    assert {path.relative_to(run) for path in run.rglob("*")} == files
    for name in sorted(files):
        if (whole / name).is_file() and name.name not in ("log.txt", "lock", "metrics.jsonl"):
            assert content(run / name) == content(whole / name), name
    assert timeless(run) == timeless(whole)
