"""Rows have the same order and numbers in the live run, in a resumed run and in a replay of the run's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from largebatch.runs.folder import RunFolder
from largebatch.runs.metrics import MetricsLog
from largebatch.tracking.layers import LayerLog
from largebatch.tracking.rows import COLUMNS, Layer, Media, RowOrder, has_layer_row, has_metrics_row, replay

STEPS, EVERY, LAYERS = 100, 7, [Layer("conv1.weight", 4), Layer("head.bias", 1)]
ROWS_EVERY = 5
LAYER_STEPS = sorted({1, 2, 5, 10, *range(EVERY, STEPS + 1, EVERY)})
ROW_STEPS = [*range(1, 21), *range(25, STEPS + 1, ROWS_EVERY)]
Logged = list[tuple[int, float, bool]]  # number, step and whether it is a layer row


def epoch(step: int) -> float:
    """Return the epoch after a step of a growing batch: 10, and from step 60 on 30 images, of 200."""
    return (10 * min(step, 60) + 30 * max(step - 60, 0)) / 200


class Run:
    """Record a run as the recorder does, from the step of a checkpoint to ``stop``; ``logged`` is what W&B gets.

    At step ``diverges_at`` the run writes a row for each step since the last row.
    """

    def __init__(self, folder: RunFolder, resumed_at: int = 0) -> None:
        self.folder, self.step = folder, resumed_at
        self.logged: Logged = []
        self.epochs: list[float] = []  # of the rows after the image grid
        self.metrics = MetricsLog(folder.metrics, resumed_at)
        self.order = RowOrder(self.log, EVERY, STEPS)
        self.layer_log = LayerLog(folder.layers, resumed_at, self.order.layers)
        replay(folder, self.order, resumed_at)

    def log(self, number: int, row: dict[str, Any], _: Media) -> None:
        self.epochs += [row["epoch"]] * (number > 0)
        self.logged.append((number, row["step"], f"layers/{COLUMNS[0]}/{LAYERS[0].name}" in row))

    def train(self, stop: int, checkpoints: int = 40, diverges_at: int = 0) -> None:
        last = max((row for row in ROW_STEPS if row <= self.step), default=0)
        for step in range(self.step + 1, stop + 1):
            if step in LAYER_STEPS:
                self.order.expect_layers(step)
                self.layer_log.add(step, LAYERS, dict.fromkeys(COLUMNS, torch.ones(2)))
            if step in ROW_STEPS or step == diverges_at:
                for of_step in range(last + 1, step + 1) if step == diverges_at else [step]:
                    row = {"step": of_step, "epoch": epoch(of_step), "train/loss": 1.0}
                    self.metrics.write(row)
                    self.order.row(row)
                last = step
            if step % checkpoints == 0:
                self.layer_log.to_write()()

    def end(self) -> None:
        self.layer_log.to_write()()
        self.metrics.close()


def replayed(folder: RunFolder, is_over: bool) -> Logged:
    logged: Logged = []
    order = RowOrder(lambda number, row, _: logged.append((number, row["step"], len(row) > 3)), EVERY, STEPS)
    replay(folder, order, is_over=is_over)
    assert order.count == len(logged)
    return logged


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "images.png").touch()
    return RunFolder(tmp_path)


def test_the_replay_of_a_run_has_the_numbers_of_the_live_run(folder: RunFolder) -> None:
    run = Run(folder)
    run.train(STEPS)
    run.end()
    steps = LAYER_STEPS + ROW_STEPS
    assert [step for _, step, _ in run.logged] == [0, *sorted(steps)]
    assert [number for number, _, _ in run.logged] == list(range(len(steps) + 1))
    assert [is_layers for _, step, is_layers in run.logged if step == 35] == [True, False]
    assert replayed(folder, is_over=True) == run.logged
    assert run.epochs == pytest.approx([epoch(step) for _, step, _ in run.logged[1:]])


@pytest.mark.parametrize("killed_at", [1, 6, 7, 34, 40, 41, 79, 80, 99])
def test_a_killed_run_has_the_numbers_of_an_undisturbed_run(tmp_path: Path, killed_at: int) -> None:
    """Its rows in W&B, a replay of its files and the resumed run are each the first rows of the same sequence."""
    (tmp_path / "whole").mkdir()
    whole = Run(RunFolder(tmp_path / "whole"))
    whole.train(STEPS)
    whole.end()
    folder = RunFolder(tmp_path / "killed")
    folder.path.mkdir()
    killed = Run(folder)
    killed.train(killed_at)
    sent = replayed(folder, is_over=False)
    assert killed.logged == whole.logged[: len(killed.logged)]
    assert sent == whole.logged[: len(sent)]
    assert {step for step in ROW_STEPS if step <= killed_at // 40 * 40} <= {step for _, step, _ in sent}
    resumed = Run(folder, resumed_at=killed_at // 40 * 40)
    resumed.train(STEPS)
    resumed.end()
    assert resumed.logged == whole.logged == replayed(folder, is_over=True)


@pytest.mark.parametrize("checkpoints", [1, 3, 40])
@pytest.mark.parametrize("diverges_at", [4, 20, 24, 30, 73, 77])
def test_a_diverged_run_has_a_row_for_each_step_since_the_last_row(
    folder: RunFolder, diverges_at: int, checkpoints: int
) -> None:
    """A checkpoint may have read layer rows of steps whose rows of metrics are written later."""
    run = Run(folder)
    run.train(diverges_at, checkpoints, diverges_at)
    run.end()
    last = max(step for step in [0, *ROW_STEPS] if step < diverges_at)
    steps = [step for step in LAYER_STEPS + ROW_STEPS if step <= last or (step in LAYER_STEPS and step <= diverges_at)]
    assert [step for _, step, _ in run.logged] == sorted([0, *steps, *range(last + 1, diverges_at + 1)])
    assert [number for number, _, _ in run.logged] == list(range(len(run.logged)))
    assert replayed(folder, is_over=True) == run.logged


def test_the_first_steps_have_rows_of_their_own() -> None:
    assert [step for step in range(1, STEPS + 1) if has_metrics_row(step, ROWS_EVERY)] == ROW_STEPS
    assert [step for step in range(1, STEPS + 1) if has_layer_row(step, EVERY)] == LAYER_STEPS
    assert not any(has_layer_row(step, 0) for step in range(STEPS))


def test_without_layer_rows_all_rows_of_a_killed_run_have_a_number(folder: RunFolder) -> None:
    log = MetricsLog(folder.metrics, 0)
    for step in (5, 10):
        log.write({"step": step, "epoch": epoch(step)})
    steps: list[int] = []
    replay(folder, RowOrder(lambda number, row, _: steps.append(row["step"]), 0, STEPS), is_over=False)
    assert steps == [0, 5, 10]
