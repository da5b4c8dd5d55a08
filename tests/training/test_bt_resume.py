"""Stopping Barlow Twins and resuming it with the real program, in each of its phases: exact."""

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
from runs import finish, the_run, timeless, train_in
from test_bt import BT, checkpoint, of_backbone, same, status_of, summary_of
from test_resume import stop_run, wait_for_step

# Six steps, and three epochs of three probe steps each. The last checkpoints are amid an epoch and at the end.
SHORT = (*BT, "model.norm=batch", "steps=6", "checkpoint.every_steps=11")
MIDDLE, END = 11, 15
KINDS = {
    "augmented": ["mode.eval_augmentation=true"],
    "fine-tuned in two processes": ["mode.lr_backbone=0.01", "cluster.processes=2"],
}


@pytest.fixture(scope="module", params=KINDS)
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that nothing stopped, and what kind it is of."""
    return train_in(tmp_path_factory.mktemp("runs") / "undisturbed", *SHORT, *KINDS[request.param]), request.param


def test_a_probe_leaves_the_backbone_as_it_is_and_fine_tuning_does_not(undisturbed: tuple[Path, str]) -> None:
    run, kind = undisturbed
    before, after = checkpoint(run, MIDDLE)["model"], checkpoint(run, END)["model"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if kind == "augmented":
        assert changed == set()
    else:
        assert changed == of_backbone(before).keys()  # running statistics too
        assert {"backbone.norm1.running_mean", "backbone.norm1.running_var"} <= changed


def test_a_run_killed_in_what_follows_on_pretraining_continues_exactly(
    tmp_path: Path, undisturbed: tuple[Path, str]
) -> None:
    whole, kind = undisturbed
    resume_after(MIDDLE, END, whole, tmp_path, *SHORT, *KINDS[kind])


def resume_after(step: int, steps: int, whole: Path, folder: Path, *command: str) -> None:
    """As if the run had been killed when its last checkpoint was that after ``step``."""
    stopped = folder / "runs" / whole.name
    shutil.copytree(whole, stopped)
    as_if_killed(stopped, step)
    assert f"resumed after step {step} of {steps}" in finish(start(*command, cwd=folder))
    assert_equal_runs(stopped, whole)


def as_if_killed(run: Path, step: int) -> None:
    """What a run leaves that was killed after ``step``, of which it had a checkpoint."""
    for path in (run / "checkpoints").iterdir():
        if path.name > f"step-{step:08d}.pt":
            path.unlink()
    assert (run / "checkpoints" / f"step-{step:08d}.pt").exists()
    for name in ("summary.json", "metrics.parquet"):
        (run / name).unlink()
    (run / "status.json").write_text(json.dumps(status_of(run) | {"state": "running"}))


def assert_equal_runs(one: Path, other: Path) -> None:
    """In parameters, running statistics, optimizers and rows, bit for bit."""
    (a, b) = (torch.load(max((run / "checkpoints").iterdir()), weights_only=True) for run in (one, other))
    del a["seconds"], b["seconds"]
    assert differences(a, b) == []
    assert timeless(one) == timeless(other)
    assert figures(one) == figures(other)
    assert status_of(one)["state"] == "finished"


def figures(run: Path) -> dict[str, Any]:
    return {name: value for name, value in summary_of(run).items() if "/" in name or name in ("state", "step")}


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """The places in which two checkpoints aren't the same."""
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


# Long enough to be stopped in the middle of either phase: 40 steps, then 1200.
LONG = (*BT, "model.norm=batch", "steps=40", "mode.eval_epochs=400", "checkpoint.every_steps=7")


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run; its last checkpoints are that after pre-training and that at the end."""
    plain = [item for item in LONG if item != "checkpoint.every_steps=7"]
    return train_in(tmp_path_factory.mktemp("runs") / "long", *plain, "checkpoint.every_seconds=1e6")


def test_a_run_killed_between_pretraining_and_the_probe_continues_exactly(tmp_path: Path, long: Path) -> None:
    assert same(checkpoint(long, 40)["model"], checkpoint(long, 1240)["model"])
    resume_after(40, 1240, long, tmp_path, *LONG)


def test_a_run_killed_in_both_phases_and_interrupted_in_the_second_continues_exactly(
    tmp_path: Path, long: Path
) -> None:
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
    """Start the long run, stop it once it has come to ``step``; the step that it was resumed after, or 0."""
    process = start(*LONG, cwd=folder)
    wait_for_step(folder, step, process)
    out, _ = stop_run(the_run(folder), process, how)
    assert process.returncode == {"worker": 1, "everything": -signal.SIGKILL, "interrupt": 130}[how]
    resumed = re.search(r"resumed after step (\d+) ", out)
    return int(resumed[1]) if resumed else 0
