"""Runs with ``tracker=trackio``, read by trackio's own local reader in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, environment, start
from copies import local_rows
from runs import TIMES, finish

from largebatch.runs.folder import RunFolder
from largebatch.tracking.rows import COLUMNS

pytest.importorskip("trackio", reason="needs the extra trackio")

RUN = [
    *(item for item in TINY if item != "tracker=none"), "tracker=trackio", "tracker.images=true",
    "tracker.predictions=true", "tracker.project=mine", "steps=30", "checkpoint.every_steps=20",
]  # fmt: skip
READ = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
(name,) = SQLiteStorage.get_runs("mine")
print(json.dumps([name, SQLiteStorage.get_run_config("mine", name), SQLiteStorage.get_logs("mine", name)]))
"""


def read(folder: Path) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """Return name, configuration and rows of the only run."""
    env = environment() | {"TRACKIO_DIR": str(folder / "runs" / ".trackio")}
    done = subprocess.run(
        [sys.executable, "-c", READ], env=env, capture_output=True, text=True, timeout=100, check=True
    )
    name, config, rows = json.loads(done.stdout.splitlines()[-1])
    return name, config, rows


def numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of metrics and layers without times and media."""
    found = [
        {k: v for k, v in row.items() if k not in (*TIMES, "timestamp") and not isinstance(v, dict)} for row in rows
    ]
    return [row for row in found if row.keys() - {"step", "epoch"}]


def by_step(row: dict[str, Any]) -> tuple[int, list[str]]:
    return row["step"], sorted(row)


def test_trackio_reads_every_row_once_also_of_a_resumed_run(tmp_path: Path) -> None:
    """Before the second start, the folder is as a kill leaves it, after some rows that the last checkpoint lacks."""
    assert "trackio show --project mine" in finish(start(*RUN, cwd=tmp_path))
    run = next(path for path in (tmp_path / "runs").iterdir() if not path.name.startswith("."))
    name, config, rows = read(tmp_path)
    assert name == run.name
    assert (config["batch_size"], config["resolved"]["steps"]) == (16, 30)
    expected = sorted(local_rows(run, 4), key=by_step)
    assert sorted(numbers(rows), key=by_step) == expected
    media = {key: value["_type"] for row in rows for key, value in row.items() if isinstance(value, dict)}
    of_layers = {f"layers/{column}": "trackio.histogram" for column in COLUMNS}
    assert media == {"images": "trackio.image", "confusion_matrix": "trackio.image", **of_layers}

    sorted(run.glob("checkpoints/step-*.pt"))[-1].unlink()
    (run / "summary.json").unlink()
    RunFolder(run).update_status(state="running")
    assert "resumed after step 20 of 30" in finish(start(*RUN, cwd=tmp_path))
    assert sorted(numbers(read(tmp_path)[2]), key=by_step) == expected
