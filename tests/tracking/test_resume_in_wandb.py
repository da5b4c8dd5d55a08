"""Runs that are killed and resumed, online and offline: W&B has each row of the run folder once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, environment
from copies import local_rows, timeless
from protocol import TakenRun
from recorder import Recorded, recorder
from runs import the_run

from largebatch.runs.metrics import newest
from largebatch.tracking.wandb_run import read_uploads

pytestmark = pytest.mark.slow

KEY = "c0ffee" * 6 + "beef"
# Some seconds long, so that rows are in wandb's file or on the server when the run is killed.
RUN = [
    *(item for item in TINY if item != "tracker=none"),
    "steps=300", "eval_every=20", "checkpoint.every_steps=40", "tracker.layers_every=7", "cluster.threads=1",
]  # fmt: skip
STEPS_PER_EPOCH = 4


def surroundings(folder: Path, server: Recorded | None) -> dict[str, str]:
    """Return the environment of a command, with its own home; wandb sends rows each second."""
    more = server.environment(KEY) if server else {}
    return {**environment(), "HOME": str(folder), "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1", **more}


def begin(folder: Path, server: Recorded | None) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "launch.py"), *RUN]
    return subprocess.Popen(
        command, cwd=folder, env=surroundings(folder, server), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def train(folder: Path, server: Recorded | None) -> str:
    process = begin(folder, server)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, out + errors
    return out


def train_and_kill(folder: Path, server: Recorded | None) -> None:
    """Kill the worker after a checkpoint, once W&B or its file has rows of this start."""
    old_parts, old_rows = (
        list(folder.glob("runs/*/wandb/*run-*")),
        len(server.run.history) if server and server.runs else 0,
    )
    process = begin(folder, server)
    deadline = time.monotonic() + 100
    while not _has_rows(folder, server, old_parts, old_rows):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill(json.loads((the_run(folder) / "status.json").read_text())["pid"], signal.SIGKILL)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 1, out + errors
    time.sleep(1.1)  # wandb names its folders by the second


def _has_rows(folder: Path, server: Recorded | None, old_parts: list[Path], old_rows: int) -> bool:
    """Return True if W&B, or wandb's newest file, has rows of this start and there is a checkpoint."""
    logs = [log for log in folder.glob("runs/*/wandb/*run-*/run-*.wandb") if log.parent not in old_parts]
    if not logs or not list(folder.glob("runs/*/checkpoints/step-*.pt")):
        return False
    if (newest(the_run(folder) / "metrics.jsonl", "step") or 0) < 50:
        return False
    if server is None:
        return b"train/loss" in logs[0].read_bytes()
    return any(len(taken.history) > old_rows for taken in server.runs.values())


def sync(folder: Path, server: Recorded | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "largebatch.cli", "sync", *arguments]
    return subprocess.run(
        command, cwd=folder, env=surroundings(folder, server), capture_output=True, text=True, timeout=100, check=False
    )


def assert_same(run: Path, taken: TakenRun) -> None:
    assert [timeless(row) for row in taken.rows()] == local_rows(run, STEPS_PER_EPOCH)
    assert [row["_step"] for row in taken.history] == list(range(len(taken.history)))
    summary = json.loads((run / "summary.json").read_text())
    for name in ("test/accuracy", "train/loss", "best/test/accuracy", "best/epoch", "state", "step", "wall_seconds"):
        assert taken.summary[name] == summary[name], name
    assert taken.exit_code == 0


def test_online_twice(tmp_path: Path) -> None:
    with recorder() as server:
        train_and_kill(tmp_path, server)
        before = len(server.run.history)
        assert "resumed after step" in train(tmp_path, server)
        assert len(server.run.history) > before
        assert_same(the_run(tmp_path), server.run)
        assert server.unknown == []
        done = sync(tmp_path, server)
        assert done.stdout == "1 run(s) were uploaded before\n", done.stdout + done.stderr
        assert_same(the_run(tmp_path), server.run)
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"], "nothing is outside the run folder"


def test_a_server_that_tells_no_number_of_rows_gets_each_row_once(tmp_path: Path) -> None:
    """The run ends without an alarm, and a sync has nothing to add. A preempted run is resumed after its last row."""
    with recorder() as server:
        server.counts = False
        process = begin(tmp_path, server)
        deadline = time.monotonic() + 100
        while not _has_rows(tmp_path, server, [], 0):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.terminate()
        process.communicate(timeout=60)
        (entry,) = read_uploads(the_run(tmp_path)).values()
        assert entry["uploaded"]
        assert 0 < entry["rows"] == len(server.run.history)
        out = train(tmp_path, server)
        assert "resumed after step" in out
        assert "tracker=wandb is off" not in out
        assert_same(the_run(tmp_path), server.run)
        assert sync(tmp_path, server).stdout == "1 run(s) were uploaded before\n"
        assert_same(the_run(tmp_path), server.run)


def test_a_killed_run_is_synced_and_then_resumed(tmp_path: Path) -> None:
    """The sync sends the rows up to the last checkpoint at least; the resumed run and a second sync add the rest."""
    train_and_kill(tmp_path, None)
    run = the_run(tmp_path)
    with recorder() as server:
        done = sync(tmp_path, server)
        assert (done.returncode, done.stderr) == (0, "")
        checkpoint = max(int(path.stem.removeprefix("step-")) for path in run.glob("checkpoints/step-*.pt"))
        rows = local_rows(run, STEPS_PER_EPOCH)
        sent = [timeless(row) for row in server.run.rows()]
        assert sent == rows[: len(sent)]
        assert sent[-1]["step"] >= max(row["step"] for row in rows if row["step"] <= checkpoint)
        assert server.run.exit_code == 1
        train(tmp_path, None)
        assert sync(tmp_path, server).returncode == 0
        assert_same(run, server.run)
        assert server.unknown == []


def test_offline_twice_and_synced(tmp_path: Path) -> None:
    train_and_kill(tmp_path, None)
    train(tmp_path, None)
    run = the_run(tmp_path)
    with recorder() as server:
        would = sync(tmp_path, None, "--dry-run")
        assert (would.returncode, would.stderr) == (0, "")
        rows = len(local_rows(run, STEPS_PER_EPOCH))
        assert would.stdout == f"{run.name}  would upload what W&B lacks of {rows} rows\n"
        done = sync(tmp_path, server)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{run.name}  uploaded {rows} of {rows} rows\n"
        assert_same(run, server.run)
        again = sync(tmp_path, server)
        assert (again.returncode, again.stdout) == (0, "1 run(s) were uploaded before\n")
        assert server.unknown == []


def test_offline_then_online_then_offline_and_synced(tmp_path: Path) -> None:
    """The online start sends the rows of the offline start too. The sync sends only what is missing."""
    train_and_kill(tmp_path, None)
    with recorder() as server:
        train_and_kill(tmp_path, server)
        sent = len(server.run.history)
        train(tmp_path, None)
        done = sync(tmp_path, server)
        assert done.returncode == 0, done.stdout + done.stderr
        rows = len(server.run.history)
        assert done.stdout.endswith(f"  uploaded {rows - sent} of {rows} rows\n")
        assert rows > sent > 0
        assert_same(the_run(tmp_path), server.run)
        assert server.unknown == []
