"""Comparison of two folders of one run: equal bits, equal files, nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from runs import timeless

TIMES = (
    "seconds", "started", "ended", "updated", "queued", "pid", "host", "images_per_second", "memory", "step_ms",
    "wandb_id",  # None if a fault cost W&B's record
)  # fmt: skip


def without_times(value: Any) -> Any:
    """Drop measured times, however deep. Tensors become types, shapes and bytes."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not any(time in str(k) for time in TIMES)}
    if isinstance(value, list | tuple):
        return [without_times(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    return value


def content(run: Path, name: Path) -> Any:
    """Return what a file of a run folder holds, without times."""
    path = run / name
    if path.suffix == ".json":
        return without_times(json.loads(path.read_text()))
    if path.suffix == ".parquet":
        table = pyarrow.parquet.read_table(path)
        return table.drop([name for name in table.column_names if any(time in name for time in TIMES)]).to_pylist()
    if path.suffix == ".pt":
        return without_times(torch.load(path, weights_only=True, map_location="cpu"))
    # config.yaml has absolute paths. A repetition may be resumed by a command with rerun=true or without it.
    return path.read_bytes().replace(bytes(run.parents[1]), b"FOLDER").replace(b"rerun: true", b"rerun: false")


def files_of(folder: Path) -> set[Path]:
    """Return the relative paths of all files and folders, without those of trackers, which a fault may cost."""
    paths = {path.relative_to(folder) for path in folder.rglob("*")}
    return {path for path in paths if path.parts[0] not in ("wandb", "tensorboard") or path.suffix == ".tmp"}


def assert_same_run(run: Path, whole: Path) -> None:
    """Compare all files of two run folders, and what they are: nothing is missing, nothing is left behind."""
    files = files_of(whole)
    assert files_of(run) == files
    for name in sorted(files):
        if (whole / name).is_file() and name.name not in ("log.txt", "lock", "metrics.jsonl"):
            assert content(run, name) == content(whole, name), name
    assert timeless(run) == timeless(whole)


def top_of(folder: Path) -> list[str]:
    """Return the names of the runs of a working directory, and of everything else in it."""
    return sorted(str(path.relative_to(folder)) for path in (*folder.iterdir(), *folder.glob("runs/*")))
