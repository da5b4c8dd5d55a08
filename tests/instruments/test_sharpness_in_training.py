"""The sharpness in runs: it changes nothing of the training, and all processes and resumed runs agree."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, configuration, start
from runs import finish, kill_after_checkpoint, the_run, timeless, train_in
from steps import take_steps

from largebatch.config.checks import validate
from largebatch.config.identity import identity
from largebatch.errors import UserError
from largebatch.runs.folder import RunFolder
from largebatch.runs.metrics import Row
from largebatch.tracking.console import Console
from largebatch.training.phase import MainPhase
from largebatch.training.set_up import set_up

ON = ("instruments.sharpness_every=1", "instruments.sharpness_samples=8")
NAMES = ["eigenvalue", "preconditioned", "trace", "trace_se", "sam", "asam"]


def begun(folder: Path, *overrides: str) -> MainPhase:
    folder.mkdir()
    config = configuration(*TINY, "model=tinycnn", "steps=40", *overrides)
    with Console(folder / "log.txt", speaking=False) as console:
        return set_up(config, RunFolder(folder), 0, 1, torch.device("cpu"), console, None)


def measured(phase: MainPhase) -> Row:
    """Return the metrics of the instrument."""
    return {name: value for name, value in phase.measure().items() if name.startswith("sharpness/")}


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer=lars", "model.norm=batch", "batch_norm_size=16"),
        ("optimizer=clars", "instruments.noise_scale=true"),
        ("optimizer=adamw", "ema_decay=0.9", "micro_batch=auto", "mode.label_smoothing=0.1"),
        ("optimizer=vrlamb", "optimizer.sample_size=4"),
    ],
    ids=" ".join,
)
def test_training_is_bit_equal_with_and_without(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    if "model.norm=batch" in overrides:
        overrides = ("model=smallcnn", *overrides)
    off, on = begun(tmp_path / "off", *overrides), begun(tmp_path / "on", *overrides, *ON)
    take_steps(off, 2)
    assert measured(off) == {}
    rows = []
    for _ in range(2):
        rows.append(measured(on))
        take_steps(on, 1)
    assert on.training.checksum() == off.training.checksum()
    known = "optimizer=vrlamb" not in overrides
    names = {f"sharpness/{name}" for name in NAMES}
    assert rows[0].keys() == names - {"sharpness/preconditioned"}
    assert rows[1].keys() == (names if known else rows[0].keys())


def test_a_checkpoint_gives_the_same_numbers(tmp_path: Path) -> None:
    whole, resumed = begun(tmp_path / "whole", *ON), begun(tmp_path / "resumed", *ON)
    take_steps(whole, 2)
    saved = copy.deepcopy({"step": 2, **whole.training.state(0.0)})
    resumed.training.load(saved, rank=0)
    for phase in (resumed, whole):
        take_steps(phase, 1)
    found = measured(resumed)
    assert "sharpness/preconditioned" in found
    assert found == measured(whole)


def test_the_batch_follows_from_the_seed_and_has_no_augmentation(tmp_path: Path) -> None:
    first, augmented, other = (
        begun(tmp_path / name, *ON, *more)
        for name, more in (("first", ()), ("augmented", ("dataset.crop_padding=2",)), ("other", ("seed=1",)))
    )
    values = [phase.training.fixed_loss for phase in (first, augmented, other)]
    batches = [loss._images for loss in values if loss is not None]
    assert [len(batch) for batch in batches] == [8, 8, 8]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_when_it_is_measured(tmp_path: Path) -> None:
    """An epoch has 4 steps."""
    phase = begun(tmp_path / "run", "steps=13", "instruments.sharpness_every=2")
    assert [step for step in range(14) if phase.measures_after(step)] == [0, 8, 13]
    assert not any(map(begun(tmp_path / "off").measures_after, range(14)))


def test_a_network_without_second_derivatives_is_refused(tmp_path: Path) -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
            return values.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient

    phase = begun(tmp_path / "run", *ON)
    loss = phase.training.fixed_loss
    assert loss is not None
    plain = loss._loss
    loss._loss = lambda network, *batch: plain(lambda images: Once.apply(network(images)), *batch)
    with pytest.raises(UserError, match=r"sharpness_every=1: model.name=tinycnn has an operation without a second"):
        phase.measure()


def test_the_instrument_is_no_part_of_a_run_s_identity() -> None:
    assert identity(configuration(*TINY, *ON)) == identity(configuration(*TINY))


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("mode=bt", *ON), r"instruments\.sharpness_every=1: not allowed with mode=bt.*Allowed: mode=clf"),
        (ON[1:], r"instruments\.sharpness_samples=8: only instruments\.sharpness_every has this key"),
        (("instruments.sharpness_every=0",), r"instruments\.sharpness_every=0: must be an integer of at least 1"),
        ((*ON[:1], "instruments.sharpness_samples=0"), r"instruments\.sharpness_samples=0: must be an integer of at"),
    ],
)
def test_an_impossible_choice_is_refused(overrides: tuple[str, ...], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        validate(configuration(*TINY, *overrides))


RUN = (
    *TINY, "steps=22", "eval_every=4", "cluster.processes=2", "cluster.threads=1", "checkpoint.every_steps=5",
    "optimizer=adamw", "model.norm=batch", "batch_norm_size=8",
)  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_of_two_processes_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    """The parameters at the end are those of a run without the instrument."""
    few = ("instruments.sharpness_every=2", "instruments.sharpness_samples=6")
    off, on = train_in(tmp_path / "off", *RUN), train_in(tmp_path / "on", *RUN, *few)
    (tmp_path / "killed").mkdir()
    kill_after_checkpoint(tmp_path / "killed", *RUN, *few)
    assert "resumed after step" in finish(start(*RUN, *few, cwd=tmp_path / "killed"))
    killed = the_run(tmp_path / "killed")
    assert timeless(killed) == timeless(on)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (off, on, killed)]
    assert len({summary["checksum"] for summary in summaries}) == 1
    assert summaries[1]["sharpness/eigenvalue"] == timeless(on)[-1]["sharpness/eigenvalue"]
    with_sharpness = [row for row in timeless(on) if "sharpness/trace" in row]
    assert [row["step"] for row in with_sharpness] == [0, 8, 16, 22]
    assert [row["step"] for row in with_sharpness if "test/accuracy" in row] == [16, 22]

    one = begun(tmp_path / "one", *[key for key in RUN if "processes" not in key], "model=smallcnn", *few)
    numbers = {name: value for name, value in with_sharpness[0].items() if name.startswith("sharpness/")}
    here = one.measure()
    assert {name: here[name] for name in numbers} == pytest.approx(numbers, rel=5e-3, abs=1e-6)
