"""A run that diverges keeps its last finite checkpoints and its last finite losses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import TINY
from programs import Programs

DIVERGES = (*TINY, "steps=40", "optimizer=sgd", "optimizer.lr=1e30", "eval_every=100", "checkpoint.every_steps=1")


@pytest.mark.parametrize("processes", [1, 2])
def test_checkpoints_and_summary_of_a_diverged_run_are_finite(
    tmp_path: Path, process: Programs, processes: int
) -> None:
    run = process.train(tmp_path, *DIVERGES, f"cluster.processes={processes}")
    status, summary = (json.loads((run / name).read_text()) for name in ("status.json", "summary.json"))
    assert status["state"] == "diverged"
    assert "inf" not in status["message"].rpartition("step")[2]
    assert summary["train/loss"] is not None
    assert math.isfinite(summary["train/loss"])
    for path in (run / "checkpoints").iterdir():
        saved = torch.load(path, weights_only=True)
        assert all(bool(value.isfinite().all()) for value in saved["model"].values())
        assert bool(saved["unlogged"]["totals"].isfinite().all())


def test_an_optimizer_that_cannot_decompose_an_infinite_gradient_diverges(tmp_path: Path, process: Programs) -> None:
    run = process.train(tmp_path, *DIVERGES, "optimizer=shampoo")
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("diverged", 2)
    assert status["message"] == "the loss was not finite at step 2"


def test_a_checkpoint_after_the_divergence_does_not_replace_finite_checkpoints(
    tmp_path: Path, process: Programs
) -> None:
    """Rows are due after the first 20 steps and at step 60; the loss leaves the range of numbers between them."""
    command = [*TINY, "steps=60", "tracker.log_every=60", "eval_every=100", "optimizer=sgd", "checkpoint.every_steps=1"]
    command += ["optimizer.lr=1", "optimizer.weight_decay=40"]  # weights grow 39-fold in each step
    run = process.train(tmp_path, *command)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "diverged"
    bad_step = int(status["message"].rpartition(" ")[2])
    kept = [int(path.stem.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*.pt")]
    assert len(kept) == 2
    assert max(kept) < bad_step < 60
