"""The real program on a GPU; skipped without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

RUN = (
    "dataset=synthetic", "dataset.train_size=512", "dataset.test_size=64", "model=resnet18", "batch_size=128",
    "tracker=none", "steps=6", "optimizer.lr=0.1", "cluster.processes=1",
)  # fmt: skip


def train(folder: Path, *overrides: str) -> tuple[dict[str, torch.Tensor], str]:
    """Return the final parameters of a run, and its log."""
    folder.mkdir()
    command = [sys.executable, str(ROOT / "launch.py"), *RUN, *overrides]
    result = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (run,) = (folder / "runs").iterdir()
    newest = sorted((run / "checkpoints").iterdir())[-1]
    state = torch.load(newest, map_location="cpu", weights_only=True)
    return state["model"], (run / "log.txt").read_text()


def test_the_location_of_the_pixels_does_not_change_the_result(tmp_path: Path) -> None:
    common = ("deterministic=true", "precision=fp32")
    on_device, log = train(tmp_path / "device", *common, "dataset.location=device")
    in_host_memory, other_log = train(tmp_path / "host", *common, "dataset.location=host")
    assert "on the device" in log
    assert "in host memory" in other_log
    assert all(torch.equal(tensor, in_host_memory[name]) for name, tensor in on_device.items())


@pytest.mark.parametrize("division", ["micro_batch=null", "micro_batch=32"])
def test_compiled_passes_train_the_same_up_to_rounding(tmp_path: Path, division: str) -> None:
    """CUDA graphs are used without accumulation only."""
    eager, _ = train(tmp_path / "eager", "precision=fp32", "compile=false", division)
    compiled, log = train(tmp_path / "compiled", "precision=fp32", "compile=true", division)
    assert ("with CUDA graphs" in log) == (division == "micro_batch=null")
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-2, atol=1e-3)


def test_the_exact_loss_of_barlow_twins_is_the_same_in_micro_batches(tmp_path: Path) -> None:
    common = ("mode=bt", "mode.knn_every=1", "mode.eval_epochs=2", "model=smallcnn", "precision=fp32", "optimizer=sgd")
    whole, _ = train(tmp_path / "whole", *common)
    parted, _ = train(tmp_path / "parted", *common, "micro_batch=32")
    for name, tensor in whole.items():
        torch.testing.assert_close(parted[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["auto", "fp16"])
def test_a_given_precision_trains_with_micro_batch_auto(tmp_path: Path, precision: str) -> None:
    _, log = train(tmp_path / "run", "micro_batch=auto", f"precision={precision}", "profile=true")
    has_bf16 = torch.cuda.get_device_capability() >= (8, 0)
    chosen = "bf16" if precision == "auto" and has_bf16 else "fp16"
    assert f"{chosen}, channels last, on {torch.cuda.get_device_name()}" in log
    assert "finished after step 6 of 6" in log
