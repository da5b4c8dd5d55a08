"""Stopping Barlow Twins in each of its phases and resuming it exactly, with the real program."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import start
from programs import Programs
from runs import finish, the_run, timeless, train_in
from test_bt import BT, checkpoint, of_backbone, same, status_of, summary_of
from test_resume import stop_run, wait_for_step

# Six steps, then three epochs of three probe steps. The last checkpoints are in the middle of an epoch and at the end.
SHORT = (*BT, "model.norm=batch", "steps=6", "checkpoint.every_steps=11")
MIDDLE, END = 11, 15
KINDS = {
    "augmented": ["mode.eval_augmentation=true"],
    "fine-tuned in two processes": ["mode.lr_backbone=0.01", "cluster.processes=2"],
}


@pytest.fixture(scope="module", params=KINDS)
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, process: Programs
) -> tuple[Path, str]:
    """Uninterrupted run, and its kind."""
    return process.train(tmp_path_factory.mktemp("runs"), *SHORT, *KINDS[request.param]), request.param


def test_a_probe_leaves_the_backbone_unchanged_and_fine_tuning_changes_it(undisturbed: tuple[Path, str]) -> None:
    run, kind = undisturbed
    before, after = checkpoint(run, MIDDLE)["model"], checkpoint(run, END)["model"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if kind == "augmented":
        assert changed == set()
    else:
        assert changed == of_backbone(before).keys()  # running statistics too
        assert {"backbone.norm1.running_mean", "backbone.norm1.running_var"} <= changed


def test_a_run_killed_after_pretraining_resumes_exactly(
    tmp_path: Path, process: Programs, undisturbed: tuple[Path, str]
) -> None:
    whole, kind = undisturbed
    resume_after(MIDDLE, END, whole, process, tmp_path, *SHORT, *KINDS[kind])


def resume_after(step: int, steps: int, whole: Path, process: Programs, folder: Path, *command: str) -> None:
    """Resume a copy of ``whole``, cut back as if killed after ``step``, and compare the two."""
    stopped = folder / "runs" / whole.name
    shutil.copytree(whole, stopped)
    as_if_killed(stopped, step)
    assert process.train(folder, *command) == stopped
    assert f"resumed after step {step} of {steps}" in (stopped / "log.txt").read_text()
    assert_equal_runs(stopped, whole)


def as_if_killed(run: Path, step: int) -> None:
    """Cut the run back to the files of a run that was killed after its checkpoint at ``step``."""
    for path in (run / "checkpoints").iterdir():
        if path.name > f"step-{step:08d}.pt":
            path.unlink()
    assert (run / "checkpoints" / f"step-{step:08d}.pt").exists()
    for name in ("summary.json", "metrics.parquet"):
        (run / name).unlink()
    (run / "status.json").write_text(json.dumps(status_of(run) | {"state": "running"}))


def assert_equal_runs(one: Path, other: Path) -> None:
    """Compare parameters, running statistics, optimizers and metrics bit for bit."""
    (a, b) = (torch.load(max((run / "checkpoints").iterdir()), weights_only=True) for run in (one, other))
    del a["seconds"], b["seconds"]
    assert differences(a, b) == []
    assert timeless(one) == timeless(other)
    assert metrics(one) == metrics(other)
    assert status_of(one)["state"] == "finished"


def metrics(run: Path) -> dict[str, Any]:
    return {name: value for name, value in summary_of(run).items() if "/" in name or name in ("state", "step")}


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Return the places at which two checkpoints differ."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        return [found for key in one for found in differences(one[key], other[key], f"{place}.{key}")]
    if isinstance(one, list | tuple):
        assert len(one) == len(other), place
        return [
            found for n, pair in enumerate(zip(one, other, strict=True)) for found in differences(*pair, f"{place}.{n}")
        ]
    equal = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if equal else [place]


def test_a_run_killed_between_pretraining_and_the_probe_resumes_exactly(tmp_path: Path, process: Programs) -> None:
    plain = [item for item in SHORT if not item.startswith("checkpoint.")]
    whole = process.train(tmp_path / "whole", *plain, "checkpoint.every_seconds=1e6")
    assert same(checkpoint(whole, 6)["model"], checkpoint(whole, END)["model"])
    resume_after(6, END, whole, process, tmp_path / "stopped", *SHORT)


# Long enough for a stop in the middle of either phase: 40 steps, then 1200.
LONG = (*BT, "model.norm=batch", "steps=40", "mode.eval_epochs=400", "checkpoint.every_steps=7")


@pytest.mark.slow
def test_a_run_killed_in_both_phases_and_then_interrupted_resumes_exactly(tmp_path: Path) -> None:
    long = train_in(tmp_path / "whole", *LONG)
    stop(tmp_path, 20, "worker")
    assert stop(tmp_path, 200, "everything") < 40
    assert 40 <= stop(tmp_path, 600, "interrupt") < 600
    stopped = the_run(tmp_path)
    status = status_of(stopped)
    assert status["state"] == "preempted"
    assert 600 <= status["step"] < 1240
    assert checkpoint(stopped, status["step"])["step"] == status["step"]
    assert not (stopped / "summary.json").exists()
    out = finish(start(*LONG, cwd=tmp_path))
    assert f"resumed after step {status['step']} of 1240" in out
    assert_equal_runs(stopped, long)


def stop(folder: Path, step: int, how: str) -> int:
    """Start the long run and stop it at ``step``; return the step at which it had resumed, or 0."""
    process = start(*LONG, cwd=folder)
    wait_for_step(folder, step, process)
    out, _ = stop_run(the_run(folder), process, how)
    assert process.returncode == {"worker": 1, "everything": -signal.SIGKILL, "interrupt": 130}[how]
    resumed = re.search(r"resumed after step (\d+) ", out)
    return int(resumed[1]) if resumed else 0
