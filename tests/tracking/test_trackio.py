"""Runs with ``tracker=trackio``, read by trackio's own local reader in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, environment, start
from copies import local_rows
from runs import TIMES, finish, kill_after_checkpoint, the_run

from largebatch.tracking.rows import COLUMNS

pytest.importorskip("trackio", reason="needs the extra trackio")

RUN = [
    *(item for item in TINY if item != "tracker=none"), "tracker=trackio", "tracker.images=true",
    "tracker.predictions=true", "tracker.project=mine", "tracker.run_name=one", "checkpoint.every_steps=20",
]  # fmt: skip
READ = """
import json
from trackio.sqlite_storage import SQLiteStorage
found = []
for run in SQLiteStorage.get_run_records("mine"):
    chosen = {"project": "mine", "run": run["name"], "run_id": run["id"]}
    found.append([run["name"], SQLiteStorage.get_run_config(**chosen), SQLiteStorage.get_logs(**chosen)])
print(json.dumps(found))
"""
BROKEN = """
import sys, time
from pathlib import Path
from conftest import configuration
from largebatch.tracking.tracker import start_tracker
folder = Path(sys.argv[1])
config = configuration("tracker=trackio")
run = start_tracker(config, folder / "runs" / "a", "a", "a", {}, print)
(folder / "copies" / "largebatch.db").write_bytes(b"broken" * 1000)
for number in range(40):
    run.log(number, {"step": number, "epoch": 0.5, "train/loss": 2.0})
    time.sleep(0.05)
run.finish("finished")
"""


def read(folder: Path) -> list[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """Return name, configuration and rows of each run."""
    env = environment() | {"TRACKIO_DIR": str(folder / "runs" / ".trackio")}
    done = subprocess.run(
        [sys.executable, "-c", READ], env=env, capture_output=True, text=True, timeout=100, check=True
    )
    found: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of metrics and layers without times and media."""
    found = [
        {k: v for k, v in row.items() if k not in (*TIMES, "timestamp") and not isinstance(v, dict)} for row in rows
    ]
    return [row for row in found if row.keys() - {"step", "epoch"}]


def by_step(row: dict[str, Any]) -> tuple[int, list[str]]:
    return row["step"], sorted(row)


def test_trackio_reads_every_row_once_of_a_killed_and_resumed_run(tmp_path: Path) -> None:
    kill_after_checkpoint(tmp_path, *RUN, "steps=150")
    said = finish(start(*RUN, "steps=150", cwd=tmp_path))
    assert "resumed after step" in said
    assert "trackio show --project mine" in said
    run = the_run(tmp_path)
    ((name, config, rows),) = read(tmp_path)
    assert name == "one"
    assert (config["batch_size"], config["resolved"]["run"]) == (16, run.name)
    expected = sorted(local_rows(run, 4), key=by_step)
    assert sorted(numbers(rows), key=by_step) == expected
    media = {key: value["_type"] for row in rows for key, value in row.items() if isinstance(value, dict)}
    of_layers = {f"layers/{column}": "trackio.histogram" for column in COLUMNS}
    assert media == {"images": "trackio.image", "confusion_matrix": "trackio.image", **of_layers}


def test_runs_of_one_name_keep_their_own_rows(tmp_path: Path) -> None:
    finish(start("-m", *RUN, "steps=3", "seed=0,1", cwd=tmp_path))
    found = read(tmp_path)
    assert [name for name, _, _ in found] == ["one", "one"]
    assert {config["seed"] for _, config, _ in found} == {0, 1}
    assert [len(numbers(rows)) for _, _, rows in found] == [6, 6]


def test_a_database_that_breaks_ends_the_copy_with_one_message(tmp_path: Path) -> None:
    env = environment() | {"TRACKIO_DIR": str(tmp_path / "copies"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, str(tmp_path)], env=env, capture_output=True, text=True, timeout=100, check=True
    )
    started, ended = done.stdout.splitlines()
    assert started.startswith("trackio: TRACKIO_DIR=")
    assert ended.startswith("trackio logging ends: could not ")
    assert "not a database" in ended
    assert done.stderr == ""
