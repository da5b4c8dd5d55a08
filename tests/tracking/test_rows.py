"""Rows have the same order and numbers in the live run, in a resumed run and in a replay of the run's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from largebatch.runs.folder import RunFolder
from largebatch.runs.metrics import MetricsLog
from largebatch.tracking.layers import LayerLog
from largebatch.tracking.rows import COLUMNS, RowOrder, replay

STEPS, EVERY, NAMES = 100, 7, ["conv1.weight", "head.weight"]
Logged = list[tuple[int, float, bool]]  # number, step and whether it is a layer row


class Run:
    """Record a run as the recorder does, from the step of a checkpoint to ``stop``; ``logged`` is what W&B gets."""

    def __init__(self, folder: RunFolder, resumed_at: int = 0) -> None:
        self.folder, self.step = folder, resumed_at
        self.logged: Logged = []
        self.metrics = MetricsLog(folder.metrics, resumed_at)
        self.order = RowOrder(self.log, EVERY, STEPS, 10)
        self.layer_log = LayerLog(folder.layers, resumed_at, self.order.layers)
        replay(folder, self.order, resumed_at)

    def log(self, number: int, row: dict[str, Any], **_: Any) -> None:
        self.logged.append((number, row["step"], f"layers/{COLUMNS[0]}/{NAMES[0]}" in row))

    def train(self, stop: int, checkpoints: int = 40) -> None:
        for step in range(self.step + 1, stop + 1):
            if step % EVERY == 0:
                self.order.expect_layers(step)
                self.layer_log.add(step, NAMES, dict.fromkeys(COLUMNS, torch.ones(2)))
            if step % 5 == 0:
                self.metrics.write({"step": step, "train/loss": 1.0})
                self.order.row({"step": step, "train/loss": 1.0})
            if step % checkpoints == 0:
                self.layer_log.to_write()()

    def end(self) -> None:
        self.layer_log.to_write()()
        self.metrics.close()


def replayed(folder: RunFolder, is_over: bool) -> Logged:
    logged: Logged = []
    order = RowOrder(lambda number, row, **_: logged.append((number, row["step"], len(row) > 3)), EVERY, STEPS, 10)
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
    steps = [*range(EVERY, STEPS + 1, EVERY), *range(5, STEPS + 1, 5)]
    assert [step for _, step, _ in run.logged] == [0, *sorted(steps)]
    assert [number for number, _, _ in run.logged] == list(range(len(steps) + 1))
    assert [is_layers for _, step, is_layers in run.logged if step == 35] == [True, False]
    assert replayed(folder, is_over=True) == run.logged


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
    assert all(step in [step for _, step, _ in sent] for step in range(5, killed_at // 40 * 40 + 1, 5))
    resumed = Run(folder, resumed_at=killed_at // 40 * 40)
    resumed.train(STEPS)
    resumed.end()
    assert resumed.logged == whole.logged == replayed(folder, is_over=True)


def test_without_layer_rows_all_rows_of_a_killed_run_have_a_number(folder: RunFolder) -> None:
    log = MetricsLog(folder.metrics, 0)
    for step in (5, 10):
        log.write({"step": step})
    steps: list[int] = []
    replay(folder, RowOrder(lambda number, row, **_: steps.append(row["step"]), 0, STEPS, 10), is_over=False)
    assert steps == [0, 5, 10]
