"""``largebatch replay``: a run again, bit for bit, or the first step at which the runs part."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, environment
from runs import train_in

from largebatch.launch.replay import difference
from largebatch.runs.folder import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(tmp_path_factory.mktemp("replay") / "first", *TINY, "steps=6", "tracker.layers_every=2")


def replay(run: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "largebatch.cli", "replay", str(run), *overrides]
    return subprocess.run(
        command, cwd=run.parent.parent, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("name", ["metrics.jsonl", "layers.parquet", "config.yaml"])
def test_a_damaged_file_is_named(run: Path, tmp_path: Path, name: str) -> None:
    damaged = tmp_path / "runs" / run.name
    shutil.copytree(run, damaged)
    (damaged / name).write_bytes(b"[1\n]\n")
    refused = replay(damaged)
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.startswith(f"error: {damaged / name}: can't be read (")
    assert refused.stderr.count("\n") == 1


def test_a_run_repeats_bit_for_bit_and_a_difference_is_found(run: Path) -> None:
    same = replay(run)
    assert same.returncode == 0, same.stdout + same.stderr
    assert same.stdout.endswith("metrics, layers and final parameters are equal, bit for bit\n")
    again = run.parent.with_name("runs-replayed") / run.name
    summary = RunFolder(run).read_summary()
    assert RunFolder(again).read_summary()["checksum"] == summary["checksum"]
    (run / "summary.json").write_text(json.dumps(summary | {"checksum": "0123abcd"}))
    found = difference(RunFolder(run), RunFolder(again))
    assert found == f"the final parameters differ: CRC-32 0123abcd and {summary['checksum']}"
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    changed = json.loads(rows[1]) | {"train/loss": 3.0}
    (run / "metrics.jsonl").write_text("".join([rows[0], json.dumps(changed) + "\n", *rows[2:]]))
    other = replay(run, "tracker.log_every=2")
    assert other.returncode == 1
    assert f"the runs part by step {changed['step']}: train/loss was 3.0, and is " in other.stdout
    assert (again / "previous-1").is_dir()


def test_a_replay_keeps_the_setting(run: Path) -> None:
    refused = replay(run, "optimizer.lr=3")
    assert refused.returncode == 2
    assert "optimizer: differs from the setting" in refused.stderr
