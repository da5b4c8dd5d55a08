"""The images at an epoch's end that don't fill a batch: gradients, evaluation and positions of their steps."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, configuration
from programs import Programs
from runs import parameters, timeless
from torch import Tensor

from largebatch.modes.bt import BarlowTwins, loss
from largebatch.runs.folder import RunFolder
from largebatch.tracking.console import Console
from largebatch.training.phase import MainPhase
from largebatch.training.set_up import set_up

CPU = torch.device("cpu")
KEEP = ("dataset.train_size=43", "dataset.last_batch=keep")  # 16, 16 and 11 images


def at_start(folder: Path, *overrides: str) -> MainPhase:
    with Console(folder / "log.txt", speaking=False) as console:
        config = configuration(*TINY, "steps=9", *overrides)
        return set_up(config, RunFolder(folder), 0, 1, CPU, console, None)


def gradients(model: torch.nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("division", [(), ("micro_batch=8",), ("micro_batch=auto",)], ids=str)
def test_a_kept_batch_has_the_mean_gradient_of_a_hand_written_loop(tmp_path: Path, division: tuple[str, ...]) -> None:
    """The compiled network takes full micro-batches only, because another shape would compile again."""
    phase = at_start(tmp_path, *KEEP, *division)
    model, by_hand = phase.training.model, at_start(tmp_path, *KEEP).batches()
    sizes: list[int] = []

    def network(images: Tensor) -> Tensor:
        sizes.append(len(images))
        result: Tensor = phase.training.replica(images)
        return result

    phase.training.network, batches = network, phase.batches()
    for step, size in enumerate((16, 16, 11, 16, 16, 11), start=1):
        phase.training.step = step
        assert bool(phase.gradient(batches))
        got = gradients(model)
        model.zero_grad()
        images, labels = next(by_hand)
        assert len(images) == size
        F.cross_entropy(model(images), labels).backward()
        torch.testing.assert_close(got, gradients(model), rtol=1e-4, atol=1e-6)
        phase.update(None)
    assert set(sizes) == {phase.run.batch.micro_batch}
    assert sum(sizes) == 4 * 16


@pytest.mark.parametrize("division", [(), ("micro_batch=8",)], ids=str)
def test_a_kept_batch_of_barlow_twins_has_the_gradient_of_autograd(tmp_path: Path, division: tuple[str, ...]) -> None:
    bt = (*KEEP, "mode=bt", "mode.projector=[12,10]", "mode.loss_scale=1")
    phase = at_start(tmp_path, *bt, *division)
    alone = copy.deepcopy(phase.training.model).train()
    assert isinstance(alone, BarlowTwins)
    batches, whole = phase.batches(), at_start(tmp_path, *bt).batches()
    for phase.training.step in (1, 2, 3):
        phase.training.model.zero_grad()
        assert bool(phase.gradient(batches))
        images, labels = next(whole)
    assert len(labels) == 11
    loss(phase.run.config, alone, images, labels)[0].backward()
    torch.testing.assert_close(gradients(phase.training.model), gradients(alone), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("how", "evaluated", "examples"),
    [("carry", [3, 6, 9], 144), ("keep", [3, 6, 9], 129), ("drop", [2, 4, 6, 8, 9], 144)],
)
def test_positions_and_evaluations(tmp_path: Path, how: str, evaluated: list[int], examples: int) -> None:
    """With ``carry``, three epochs of 43 images are complete after 2.7, 5.4 and 8.1 steps."""
    phase = at_start(tmp_path, "dataset.train_size=43", f"dataset.last_batch={how}")
    steps = {"carry": 43 / 16, "keep": 3, "drop": 2}[how]
    assert [step for step in range(10) if phase.evaluates_after(step)] == evaluated
    assert phase.position(9) == {"step": 9, "epoch": 9 / steps, "examples": examples}


def test_two_processes_train_a_kept_batch_with_batch_norm_as_one(tmp_path: Path, process: Programs) -> None:
    """37 images leave 5 for the last batch: one group, so one of the two processes has no image."""
    command = (
        *TINY, "dataset.train_size=37", "dataset.last_batch=keep", "model.norm=batch", "batch_norm_size=8", "steps=9",
        "optimizer=lars", "optimizer.lr=0.5", "cluster.threads=1",
    )  # fmt: skip
    one, two = (process.train(tmp_path / n, *command, f"cluster.processes={n}") for n in ("1", "2"))
    assert one.name == two.name
    ours, theirs = parameters(one), parameters(two)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    losses = [[row["train/loss"] for row in timeless(run) if "train/loss" in row] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_two_processes_measure_the_samples_of_a_kept_batch_as_one(tmp_path: Path, process: Programs) -> None:
    """The last 32 images are one micro-batch, so one of the two processes has none."""
    command = (
        *TINY, "dataset.train_size=96", "batch_size=64", "dataset.last_batch=keep", "steps=3", "optimizer=vrlamb",
        "optimizer.sample_size=4", "optimizer.lr=0.05", "cluster.threads=1",
    )  # fmt: skip
    one, two = (parameters(process.train(tmp_path / n, *command, f"cluster.processes={n}")) for n in ("1", "2"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
