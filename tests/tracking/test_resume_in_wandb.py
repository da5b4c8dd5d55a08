"""A run that is killed and resumed, online and offline: W&B has the rows that the run folder has, once each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT, TINY, environment
from copies import local_rows, timeless
from protocol import TakenRun
from recorder import Recorded, recorder
from runs import the_run

from largebatch.runs.metrics import newest
from largebatch.tracking.wandb_parts import parts_of

KEY = "c0ffee" * 6 + "beef"
# Some seconds long, so that something has reached wandb's file, or the server, when the run is killed.
RUN = [
    *(item for item in TINY if item != "tracker=none"),
    "steps=300", "eval_every=20", "checkpoint.every_steps=40", "tracker.layers_every=7", "cluster.threads=1",
]  # fmt: skip
STEPS_PER_EPOCH = 4


def surroundings(folder: Path, server: Recorded | None) -> dict[str, str]:
    """The environment of a command, with a home of its own; wandb sends what it has each second."""
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
    """Kill the worker once it is past a checkpoint and W&B, or its file, has rows of this part."""
    old_parts = [part.name for run in folder.glob("runs/*") for part in parts_of(run)]
    process = begin(folder, server)
    deadline = time.monotonic() + 100
    while not _is_on_its_way(folder, server, old_parts):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill(json.loads((the_run(folder) / "status.json").read_text())["pid"], signal.SIGKILL)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 1, out + errors
    time.sleep(1.1)  # wandb names a part of a run by the second


def _is_on_its_way(folder: Path, server: Recorded | None, old_parts: list[str]) -> bool:
    for run in folder.glob("runs/*"):
        new_parts = [part for part in parts_of(run) if part.name not in old_parts]
        if not new_parts or (newest(run / "metrics.jsonl", "step") or 0) < 50:
            return False
        if server is None:
            return new_parts[0].rows() > 0
        return any(len(taken.history) > (new_parts[0].first_row() or 0) for taken in server.runs.values())
    return False


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
        said = sync(tmp_path, server)
        assert said.stdout == "1 run(s) were uploaded before\n", said.stdout + said.stderr
        assert_same(the_run(tmp_path), server.run)
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"], "nothing was left outside of the run folder"


def test_offline_twice_and_synced(tmp_path: Path) -> None:
    train_and_kill(tmp_path, None)
    train(tmp_path, None)
    run = the_run(tmp_path)
    with recorder() as server:
        would = sync(tmp_path, None, "--dry-run")
        assert (would.returncode, would.stderr) == (0, "")
        assert would.stdout.startswith(f"{run.name}  would upload 2 part(s), ")
        done = sync(tmp_path, server)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"{run.name}  uploaded 2 part(s), ")
        assert_same(run, server.run)
        again = sync(tmp_path, server)
        assert (again.returncode, again.stdout) == (0, "1 run(s) were uploaded before\n")
        assert server.unknown == []


def test_offline_then_online_then_offline_and_synced(tmp_path: Path) -> None:
    """The second part sends all that the first has; what it had not sent when it was killed comes before the third."""
    train_and_kill(tmp_path, None)
    with recorder() as server:
        train_and_kill(tmp_path, server)
        sent = len(server.run.history)
        train(tmp_path, None)
        done = sync(tmp_path, server)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "uploaded 2 part(s)" in done.stdout
        assert len(server.run.history) > sent
        assert_same(the_run(tmp_path), server.run)
        assert server.unknown == []
