"""Runs whose batch grows: one and two processes train the same, and a resume is exact."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import TINY
from programs import Programs
from runs import parameters, timeless
from same_run import assert_same_run
from test_bt import status_of, summary_of
from test_bt_resume import as_if_killed

from largebatch.config.typed import read_frozen

COMMON = (
    "tracker=none", "batch_schedule.start=8", "batch_schedule.lr_rule=sqrt", "schedule=cosine", "optimizer=lamb",
    "optimizer.lr=0.01", "checkpoint.every_steps=3", "tracker.log_every=1", "cluster.threads=1",
)  # fmt: skip
GROWING = {
    "seesaw": (
        *TINY, "tracker.log_every=1", "batch_schedule.shape=seesaw", "epochs=6", "batch_size=32",
        "checkpoint.keep_at=[26]", "eval_every=0.75",
    ),
    "norm_test": (
        "batch_schedule.shape=norm_test", "batch_schedule.eta=0.9", "batch_schedule.small_batch=2", "batch_size=64",
        "epochs=1", "dataset=digits", "dataset.val_fraction=0.5", "checkpoint.keep_at=[6,89]",
    ),
}  # fmt: skip
Grown = tuple[Path, tuple[str, ...]]  # the run's folder and command


@pytest.fixture(scope="module", params=GROWING)
def grown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, process: Programs) -> Grown:
    command = (*COMMON, *GROWING[request.param])
    return process.train(tmp_path_factory.mktemp("growing"), *command), command


def sizes_of(run: Path) -> list[int]:
    return [row["optim/batch_size"] for row in timeless(run) if "optim/batch_size" in row]


def test_the_batch_grows_while_the_learning_rate_falls_less(grown: Grown) -> None:
    run, _ = grown
    rows = [row for row in timeless(run) if "optim/batch_size" in row]
    sizes, summary, config = sizes_of(run), summary_of(run), read_frozen(run / "config.yaml")
    assert sorted(sizes) == sizes
    assert {size % 8 for size in sizes} == {0}
    assert len({*sizes}) >= 3
    assert (sizes[0], sizes[-1]) == (8, config.batch_size)
    assert rows[0]["optim/lr"] == pytest.approx(0.01 * (8 / config.batch_size) ** 0.5)
    assert rows[-1]["examples"] == sum(sizes)
    assert rows[-1]["epoch"] == pytest.approx(sum(sizes) / summary["train_images"])
    assert 0 <= config.epochs * summary["train_images"] - sum(sizes) < config.batch_size
    assert (summary["steps"], summary["training_examples"]) == (len(sizes), sum(sizes))
    assert (status_of(run)["steps"], summary["stopped_early"]) == (len(sizes), False)
    assert not any(name.startswith("noise") for row in rows for name in row)


def test_evaluations_follow_parts_of_an_epoch(grown: Grown) -> None:
    run, _ = grown
    config, rows = read_frozen(run / "config.yaml"), [row for row in timeless(run) if "optim/batch_size" in row]
    epochs = [0.0, *(row["epoch"] for row in rows)]
    ends = [after for before, after in pairwise(epochs) if after // config.eval_every > before // config.eval_every]
    evaluated = [row["epoch"] for row in timeless(run) if "test/accuracy" in row]
    assert evaluated == sorted({*ends, epochs[-1]})


def test_a_stopped_run_resumes_exactly_in_any_stage(grown: Grown, tmp_path: Path, process: Programs) -> None:
    run, command = grown
    copy = tmp_path / "runs" / run.name
    shutil.copytree(run, copy)
    first = sorted((run / "checkpoints").iterdir())[0]
    step, sizes = int(first.stem[5:]), sizes_of(run)
    assert sizes[0] < sizes[step] < sizes[-1]
    as_if_killed(copy, step)
    assert process.train(tmp_path, *command) == copy
    assert f"resumed after step {step} of" in (copy / "log.txt").read_text()
    assert_same_run(copy, run)


def test_a_step_of_keep_at_beyond_the_end_is_named(grown: Grown) -> None:
    run, command = grown
    steps, log = len(sizes_of(run)), (run / "log.txt").read_text()
    unsaved = f"checkpoint.keep_at=[89]: not saved, because the training has {steps} steps"
    assert (unsaved in log) == ("checkpoint.keep_at=[6,89]" in command)


def test_two_processes_train_the_same(grown: Grown, tmp_path: Path, process: Programs) -> None:
    """With the norm test, micro-batches of two images are the small batches in both."""
    run, command = grown
    other = process.train(tmp_path, *command, "cluster.processes=2", "micro_batch=2")
    assert other.name == run.name
    assert sizes_of(other) == sizes_of(run)
    for (name, one), two in zip(parameters(run).items(), parameters(other).values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, msg=name)
