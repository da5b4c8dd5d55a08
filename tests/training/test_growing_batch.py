"""Runs whose batch grows: one and two processes train the same, and a resume is exact."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY
from programs import Programs
from runs import parameters, timeless
from same_run import assert_same_run
from test_bt_resume import as_if_killed

GROWING = (
    *TINY, "batch_size=32", "batch_schedule.shape=seesaw", "batch_schedule.start=8", "batch_schedule.lr_rule=sqrt",
    "schedule=cosine", "epochs=6", "optimizer=lamb", "optimizer.lr=0.01", "checkpoint.every_steps=3",
    "tracker.log_every=1", "cluster.threads=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, process: Programs) -> Path:
    return process.train(tmp_path_factory.mktemp("growing"), *GROWING)


def test_the_batch_grows_while_the_learning_rate_falls_less(run: Path) -> None:
    rows = [row for row in timeless(run) if "optim/batch_size" in row]
    sizes = [row["optim/batch_size"] for row in rows]
    assert sorted(sizes) == sizes
    assert set(sizes) == {8, 16, 32}
    assert rows[0]["optim/lr"] == pytest.approx(0.01 * 0.5)  # sqrt(8 / 32)
    assert rows[-1]["examples"] == sum(sizes) <= 6 * 64
    assert rows[-1]["epoch"] == pytest.approx(sum(sizes) / 64)


def test_a_stopped_run_resumes_exactly_in_any_stage(run: Path, tmp_path: Path, process: Programs) -> None:
    copy = tmp_path / "runs" / run.name
    shutil.copytree(run, copy)
    before = sorted((run / "checkpoints").iterdir())[0]
    as_if_killed(copy, int(before.stem[5:]))
    assert process.train(tmp_path, *GROWING) == copy
    assert f"resumed after step {int(before.stem[5:])} of" in (copy / "log.txt").read_text()
    assert_same_run(copy, run)


def test_two_processes_and_smaller_micro_batches_train_the_same(run: Path, tmp_path: Path, process: Programs) -> None:
    other = process.train(tmp_path, *GROWING, "cluster.processes=2", "micro_batch=2")
    assert other.name == run.name
    for (name, one), two in zip(parameters(run).items(), parameters(other).values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, msg=name)
