"""``largebatch replay``: run a folder's configuration again, and find the first step at which the two runs differ."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow.parquet

from largebatch.launch.composition import Composed
from largebatch.launch.confirm import compose_overrides, frozen_with
from largebatch.runs.folder import RunFolder, readable
from largebatch.runs.metrics import Row, read_rows

_TIMES = ("wall_seconds", "perf/images_per_second", "perf/step_ms", "perf/sharpness_seconds")


def replay_job(run: RunFolder, runs_dir: Path, arguments: Sequence[str]) -> Composed:
    """Return the job that repeats a run in ``runs_dir``, from its first step.

    Args:
        arguments: overrides of keys that can't change the result, such as ``cluster=slurm``. Other keys keep the run's
            values, also ``cluster``.

    Raises:
        UserError: Hydra can't compose the overrides, or they change the setting.
    """
    composed, keys = compose_overrides(arguments)
    tree = frozen_with(run.config, composed, keys) | {"runs_dir": str(runs_dir), "rerun": True}
    return Composed((f"replay={run.name}",), tree, None, multirun=False)


def difference(first: RunFolder, second: RunFolder) -> str | None:
    """Describe the first difference of two finished runs in metrics, layers and parameters; None if all are equal."""
    ours: Row
    theirs: Row
    for ours, theirs in zip_longest(read_rows(first.metrics), read_rows(second.metrics), fillvalue={}):
        for key in sorted((ours.keys() | theirs.keys()) - {*_TIMES}, key=lambda key: (key != "step", key)):
            if ours.get(key) != theirs.get(key):
                return _parted(ours.get("step") or theirs["step"], key, ours.get(key), theirs.get(key))
    tables = [_layer_rows(run) for run in (first, second)]
    for ours, theirs in zip_longest(*tables, fillvalue={}):
        if ours != theirs:
            row = ours or theirs
            key = next(key for key in row if ours.get(key) != theirs.get(key))
            return _parted(row["step"], f"{key} of {row['layer']}", ours.get(key), theirs.get(key))
    checksums = [run.read_summary().get("checksum") for run in (first, second)]
    if checksums[0] != checksums[1]:
        return f"the final parameters differ: CRC-32 {checksums[0]} and {checksums[1]}"
    return None


def _layer_rows(run: RunFolder) -> list[Row]:
    if not run.layers.exists():
        return []
    with readable(run.layers):
        rows: list[Row] = pyarrow.parquet.read_table(run.layers).to_pylist()
    return rows


def _parted(step: Any, what: str, ours: Any, theirs: Any) -> str:
    return f"the runs part by step {step}: {what} was {ours}, and is {theirs} now"
