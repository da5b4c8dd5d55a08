"""A run folder's status, lock and metrics."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from largebatch.runs.folder import RunBusyError, RunFolder, this_process
from largebatch.runs.metrics import MetricsLog, read_rows, write_table

HOLDER = """
import sys
from largebatch.runs.folder import RunFolder, this_process
folder = RunFolder(sys.argv[1])
with folder.hold():
    folder.update_status(state="running", **this_process())
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_holds_a_run_and_killing_it_releases_the_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    command = [sys.executable, "-c", HOLDER, str(folder.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert folder.is_held()
        with pytest.raises(RunBusyError, match=rf"pid {holder.pid} on {this_process()['host']}"), folder.hold():
            pass
        holder.kill()
    assert not folder.is_held()
    with folder.hold():
        pass


def test_status_updates_are_merged(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.state() is None
    folder.update_status(state="queued", steps=5)
    folder.update_status(state="running")
    assert folder.state() == "running"
    assert folder.read_status()["steps"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_metrics_of_a_resumed_run_have_each_row_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "train/loss": 1.0 / step})
    log.close()
    path.write_text(path.read_text() + '{"step": 4, "train/lo')  # cut off by a crash
    log = MetricsLog(path, 2)
    for step in (3, 4):
        log.write({"step": step, "train/loss": 1.0 / step})
    log.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]


def test_metrics_are_valid_json_and_become_a_table(tmp_path: Path) -> None:
    import pyarrow.parquet

    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write({"step": 1, "train/loss": float("nan")})
    log.write({"step": 1, "test/accuracy": 0.5})
    log.close()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert rows[0]["train/loss"] is None
    write_table(rows, tmp_path / "metrics.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "metrics.parquet").to_pylist()
    assert table[1] == {"step": 1, "train/loss": None, "test/accuracy": 0.5}
