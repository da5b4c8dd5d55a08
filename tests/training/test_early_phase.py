"""Records of the first steps and of a divergence: each loss up to the end, and the norms that each update used."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from conftest import TINY, configuration
from runs import timeless
from torch import Tensor

from largebatch.config.schema import Config
from largebatch.config.typed import to_yaml
from largebatch.modes import clf
from largebatch.runs.folder import RunFolder
from largebatch.runs.metrics import read_rows
from largebatch.tracking.console import Console
from largebatch.tracking.rows import COLUMNS, Layer
from largebatch.training.phase import MainPhase
from largebatch.training.profile import StartClock
from largebatch.training.set_up import set_up
from largebatch.training.worker import train

CPU = torch.device("cpu")
RUN = (*TINY, "steps=60", "eval_every=1000", "tracker.log_every=10", "tracker.layers_every=0", "optimizer=lars")


class Killed(Exception):
    pass


def train_here(folder: RunFolder, config: Config) -> None:
    """Train in this process, from the newest checkpoint."""
    folder.path.mkdir(exist_ok=True)
    folder.config.write_text(to_yaml(config))
    with Console(folder.log, speaking=False) as console:
        train(config, folder, 0, 1, CPU, console, StartClock())


class Losses:
    """Replace the loss of training. ``of_step`` has the true loss of each step, before ``change``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, change: Callable[[int, Tensor], Tensor]) -> None:
        self.of_step: dict[int, float] = {}
        self.step, self._change, self._loss = 0, change, clf.loss
        monkeypatch.setattr(clf, "loss", self)

    def __call__(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        value, (_, correct, count) = self._loss(*arguments)
        self.step += 1
        value = self._change(self.step, value)
        self.of_step[self.step] = float(value.detach())
        return value, torch.stack([value.detach().double() * count, correct, count])


def nan_from(bad: int) -> Callable[[int, Tensor], Tensor]:
    return lambda step, value: value * (math.nan if step >= bad else 1)


def train_losses(folder: RunFolder) -> dict[int, float | None]:
    rows = [row for row in read_rows(folder.metrics) if "train/loss" in row]
    assert len(rows) == len({row["step"] for row in rows}), "a row is there twice"
    return {row["step"]: row["train/loss"] for row in rows}


@pytest.mark.parametrize(("bad", "noticed"), [(4, 4), (21, 30), (24, 30), (30, 30)])
def test_a_diverged_run_has_the_loss_of_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int, noticed: int
) -> None:
    losses = Losses(monkeypatch, nan_from(bad))
    folder = RunFolder(tmp_path / "run")
    train_here(folder, configuration(*RUN))
    status = folder.read_status()
    assert (status["state"], status["step"]) == ("diverged", noticed)
    assert status["message"] == f"the loss was not finite at step {bad}"
    found = train_losses(folder)
    assert list(found) == list(range(1, noticed + 1))
    assert {step: loss for step, loss in found.items() if step < bad} == pytest.approx(
        {step: loss for step, loss in losses.of_step.items() if step < bad}
    )
    assert [found[step] for step in range(bad, noticed + 1)] == [None] * (noticed - bad + 1)
    rows = read_rows(folder.metrics)
    assert all({"epoch", "examples", "wall_seconds", "optim/lr"} <= row.keys() for row in rows)
    assert [row["examples"] for row in rows] == [16 * step for step in range(1, noticed + 1)]
    assert folder.read_summary()["state"] == "diverged"


@pytest.mark.parametrize("bad", [24, 30])
def test_a_diverged_evaluation_keeps_the_losses_of_the_steps_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    losses = Losses(monkeypatch, lambda step, value: value)
    evaluated = {"test/loss": math.nan, "test/accuracy": 0.25}
    monkeypatch.setattr(MainPhase, "evaluate", lambda phase: evaluated)
    monkeypatch.setattr(MainPhase, "evaluates_after", lambda phase, step: step == bad)
    folder = RunFolder(tmp_path / "run")
    train_here(folder, configuration(*RUN))
    assert folder.read_status()["message"] == f"the loss was not finite at step {bad}"
    assert train_losses(folder) == pytest.approx(losses.of_step)
    assert list(losses.of_step) == list(range(1, bad + 1))
    last = read_rows(folder.metrics)[-1]
    assert (last["step"], last["test/loss"], last["test/accuracy"]) == (bad, None, 0.25)


def test_after_the_first_steps_a_row_is_the_mean_since_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = Losses(monkeypatch, lambda step, value: value)
    folder = RunFolder(tmp_path / "run")
    train_here(folder, configuration(*RUN))
    found, true = train_losses(folder), losses.of_step
    assert list(found) == [*range(1, 21), 30, 40, 50, 60]
    assert [found[step] for step in range(1, 21)] == pytest.approx([true[step] for step in range(1, 21)])
    for step in (30, 40, 50, 60):
        assert found[step] == pytest.approx(sum(true[one] for one in range(step - 9, step + 1)) / 10)
    timed = [row["step"] for row in read_rows(folder.metrics) if "perf/step_ms" in row]
    assert timed == [10, 20, 30, 40, 50, 60]  # the speed of a step that waits for its row isn't the training's speed


def test_smaller_last_batches_have_their_own_rows_and_weigh_less_in_a_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """43 images are batches of 16, 16 and 11."""
    losses = Losses(monkeypatch, lambda step, value: value)
    folder = RunFolder(tmp_path / "run")
    train_here(folder, configuration(*RUN, "dataset.train_size=43", "dataset.last_batch=keep"))
    found, true = train_losses(folder), losses.of_step
    sizes = {step: 16 if step % 3 else 11 for step in true}
    assert [found[step] for step in range(1, 21)] == pytest.approx([true[step] for step in range(1, 21)])
    for step in (30, 40, 50, 60):
        steps = range(step - 9, step + 1)
        assert found[step] == pytest.approx(
            sum(true[one] * sizes[one] for one in steps) / sum(sizes[one] for one in steps)
        )
    rows = [row for row in read_rows(folder.metrics) if "train/loss" in row]
    assert [row["examples"] for row in rows] == [sum(sizes[one] for one in range(1, row["step"] + 1)) for row in rows]
    assert rows[2]["epoch"] == 1


@pytest.mark.parametrize("killed_at", [7, 24, 27])
def test_a_resumed_run_diverges_with_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    config = configuration(*RUN, "checkpoint.every_steps=3")
    Losses(monkeypatch, nan_from(28))
    whole = RunFolder(tmp_path / "whole")
    train_here(whole, config)

    def kill(step: int, value: Tensor) -> Tensor:
        if step == killed_at:
            raise Killed
        return value

    monkeypatch.undo()
    Losses(monkeypatch, kill)
    resumed = RunFolder(tmp_path / "resumed")
    with pytest.raises(Killed):
        train_here(resumed, config)
    monkeypatch.undo()
    losses = Losses(monkeypatch, nan_from(28))
    losses.step = (killed_at - 1) // 3 * 3
    train_here(resumed, config)
    assert timeless(resumed.path) == timeless(whole.path)
    assert [row["step"] for row in timeless(whole.path)] == list(range(1, 31))


class Recorded:
    """Recorder of layer rows alone."""

    def __init__(self) -> None:
        self.found: dict[int, dict[str, tuple[int, list[float]]]] = {}

    def layers(self, step: int, layers: list[Layer], statistics: dict[str, Tensor]) -> None:
        values = zip(*(statistics[column].tolist() for column in COLUMNS), strict=True)
        self.found[step] = {
            layer.name: (layer.dimensions, list(of_layer)) for layer, of_layer in zip(layers, values, strict=True)
        }


def norm(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().sum().sqrt())


@pytest.mark.parametrize("optimizer", ["lars", "tvlars", "lamb_published", "sgd"])
def test_a_layer_row_has_what_the_update_of_its_step_used(tmp_path: Path, optimizer: str) -> None:
    config = configuration(*RUN[:-1], f"optimizer={optimizer}", "optimizer.lr_1d=0.1", "tracker.layers_every=7")
    with Console(tmp_path / "log.txt", speaking=False) as console:
        phase = set_up(config, RunFolder(tmp_path), 0, 1, CPU, console, None)
    recorder: Any = Recorded()
    batches, model = phase.batches(), phase.training.model
    expected: dict[int, dict[str, tuple[int, float, float]]] = {}
    changes: dict[int, dict[str, float]] = {}
    for step in range(1, 15):
        phase.training.step = step
        phase.gradient(batches)
        expected[step] = {
            name: (p.ndim, norm(p), norm(p.grad)) for name, p in model.named_parameters() if p.grad is not None
        }
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        phase.update(recorder)
        changes[step] = {name: norm(p.detach() - before[name]) for name, p in model.named_parameters()}
    assert list(recorder.found) == [1, 2, 5, 7, 10, 14]
    for step, layers in recorder.found.items():
        assert layers.keys() == expected[step].keys()
        for name, (dimensions, (weight, gradient, ratio, update)) in layers.items():
            wanted = expected[step][name]
            assert (dimensions, weight, gradient) == pytest.approx(wanted, rel=1e-5)
            assert update == pytest.approx(changes[step][name] / weight if weight else 0, rel=1e-5)
            scaled = config.optimizer.name != "sgd" and (dimensions > 1 or config.optimizer.name == "lamb")
            if not scaled:
                assert ratio == 1
            if config.optimizer.name == "lars" and scaled:
                assert ratio == pytest.approx(1e-3 * weight / gradient, rel=0.1)  # without the small decay
            if config.optimizer.name == "lamb" and weight == 0:
                assert ratio == 1


def test_no_layer_rows_if_they_are_off(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "off")
    train_here(folder, configuration(*RUN, "steps=12"))
    assert not folder.layers.exists()
    folder = RunFolder(tmp_path / "on")
    train_here(folder, configuration(*RUN, "steps=12", "tracker.layers_every=20"))
    assert set(pyarrow.parquet.read_table(folder.layers)["step"].to_pylist()) == {1, 2, 5, 10}
