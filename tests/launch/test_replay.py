"""``largebatch replay``: a run again, bit for bit, or the first step at which the runs part."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, environment
from programs import Programs

from largebatch.errors import UserError
from largebatch.launch.replay import difference
from largebatch.runs.folder import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, process: Programs) -> Path:
    return process.train(tmp_path_factory.mktemp("replay"), *TINY, "steps=6", "tracker.layers_every=2")


def replay(run: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "largebatch.cli", "replay", str(run)]
    return subprocess.run(
        command, cwd=run.parent.parent, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )


def damaged(run: Path, folder: Path, name: str) -> Path:
    """Return a copy of the run with one damaged file."""
    copy = folder / "runs" / run.name
    shutil.copytree(run, copy)
    (copy / name).write_bytes(b"[1\n]\n")
    return copy


def test_a_damaged_configuration_is_named(run: Path, tmp_path: Path, process: Programs) -> None:
    copy = damaged(run, tmp_path, "config.yaml")
    refused = process.call("largebatch", "replay", str(copy), cwd=tmp_path)
    assert refused.code == 2, refused.stderr
    assert refused.stderr.startswith(f"error: {copy / 'config.yaml'}: can't be read (")
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["metrics.jsonl", "layers.parquet"])
def test_a_damaged_file_is_named_in_the_comparison(run: Path, tmp_path: Path, name: str) -> None:
    copy = damaged(run, tmp_path, name)
    with pytest.raises(UserError, match=re.escape(f"{copy / name}: can't be read (")):
        difference(RunFolder(copy), RunFolder(run))


def test_a_run_repeats_bit_for_bit_and_a_difference_is_found(run: Path, process: Programs) -> None:
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
    other = process.call("largebatch", "replay", str(run), "tracker.log_every=2", cwd=run.parent.parent)
    assert other.code == 1
    assert f"the runs part by step {changed['step']}: train/loss was 3.0, and is " in other.stdout
    assert (again / "previous-1").is_dir()


def test_a_replay_keeps_the_setting(run: Path, process: Programs) -> None:
    refused = process.call("largebatch", "replay", str(run), "optimizer.lr=3", cwd=run.parent.parent)
    assert refused.code == 2
    assert "optimizer: differs from the setting" in refused.stderr
