"""The real program on two GPUs: NCCL, resume, and the same training as on one; skipped with fewer.

`pytest tests/training/test_several_gpus.py` takes about two minutes on a machine with two GPUs. No such machine has run
it yet.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

RUN = (
    "dataset=synthetic", "dataset.train_size=512", "dataset.test_size=64", "model=smallcnn", "batch_size=128",
    "tracker=none", "steps=8", "optimizer.lr=0.1", "precision=fp32", "deterministic=true", "compile=false",
    "checkpoint.every_steps=1",
)  # fmt: skip


def train(folder: Path, *overrides: str) -> Path:
    """Return the folder of a run, which finishes."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(ROOT / "launch.py"), *RUN, *overrides]
    result = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (run,) = (path.parent for path in (folder / "runs").glob("*/summary.json"))
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").iterdir())[-1]
    state: dict[str, torch.Tensor] = torch.load(newest, map_location="cpu", weights_only=True)["model"]
    return state


@pytest.mark.parametrize("mode", ["clf", "bt"])
def test_two_gpus_train_the_same_as_one_up_to_rounding(tmp_path: Path, mode: str) -> None:
    own = [f"mode={mode}", *(["mode.eval_epochs=1", "mode.knn_every=0"] if mode == "bt" else [])]
    one = weights(train(tmp_path / "one", *own, "cluster.processes=1"))
    two = train(tmp_path / "two", *own, "cluster.processes=2")
    assert json.loads((two / "summary.json").read_text())["processes"] == 2
    for name, tensor in weights(two).items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-3, atol=1e-5)


def test_a_run_on_two_gpus_resumes_exactly(tmp_path: Path) -> None:
    whole = weights(train(tmp_path / "whole", "cluster.processes=2"))
    parted = tmp_path / "parted"
    parted.mkdir()
    command = [sys.executable, str(ROOT / "launch.py"), *RUN, "cluster.processes=2"]
    process = subprocess.Popen(command, cwd=parted, env=os.environ, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "step 2/8" in line or "step 3/8" in line:
            process.send_signal(2)
            break
    process.communicate(timeout=120)
    assert all(
        torch.equal(tensor, whole[name]) for name, tensor in weights(train(parted, "cluster.processes=2")).items()
    )


def test_a_run_takes_only_the_devices_that_it_is_given(tmp_path: Path) -> None:
    run = train(tmp_path / "second", "cluster.processes=1", "cluster.devices=[1]")
    assert json.loads((run / "summary.json").read_text())["processes"] == 1
