"""Runs with all optional augmentation and practice on JPEGs in ImageNet's layout, with the real program."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import start
from datafiles import make_imagefolder
from runs import finish, kill_after_checkpoint, parameters, the_run, timeless, train_in
from same_run import assert_same_run
from test_bt_resume import as_if_killed

STEPS, SAVED = 24, 16
EVERYTHING = (
    "dataset=imagenet", "dataset.train_size=64", "dataset.test_size=8", "dataset.num_classes=4",
    "dataset.val_fraction=0.25", "dataset.location=host",
    "dataset.image_size=8", "dataset.resize_size=10", "dataset.crop_padding=0", "dataset.resized_crop.scale=[0.3,1]",
    "dataset.color_jitter.brightness=0.4", "dataset.color_jitter.hue=0.1", "dataset.rand_augment.operations=2",
    "dataset.erasing.probability=0.5", "dataset.erasing.fill=pixel",
    "mode.mixup=0.8", "mode.cutmix=1", "mode.mix_per=pair", "mode.label_smoothing=0.1",
    "clip_norm=1", "ema_decay=0.9", "early_stopping=50", "optimizer=lars", "optimizer.lr=0.5", "batch_size=16",
    f"steps={STEPS}", "checkpoint.every_steps=8", "tracker=none", "tracker.log_every=2", "cluster.threads=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    root = make_imagefolder(
        tmp_path_factory.mktemp("images"), (14, 12), classes=tuple("abcd"), train_per_class=16, test_per_class=2,
        test_name="val", extension=".JPEG",
    )  # fmt: skip
    return (*EVERYTHING, f"dataset.root={root}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, command: tuple[str, ...]) -> Path:
    """Uninterrupted run."""
    return train_in(tmp_path_factory.mktemp("runs") / "whole", *command)


def test_a_run_cut_back_to_a_checkpoint_resumes_exactly(tmp_path: Path, command: tuple[str, ...], whole: Path) -> None:
    stopped = tmp_path / "runs" / whole.name
    shutil.copytree(whole, stopped)
    as_if_killed(stopped, SAVED)
    assert f"resumed after step {SAVED} of {STEPS}" in finish(start(*command, cwd=tmp_path))
    assert_same_run(stopped, whole)


@pytest.mark.slow
def test_two_processes_train_the_same_and_resume_exactly_after_a_kill(
    tmp_path: Path, command: tuple[str, ...], whole: Path
) -> None:
    """The images and labels are equal bit for bit (test_chain.py). Sums of gradients are rounded differently."""
    two = train_in(tmp_path / "two", *command, "cluster.processes=2")
    expected, found = parameters(whole), parameters(two)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    losses = [[row["train/loss"] for row in timeless(run) if "train/loss" in row] for run in (two, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    kill_after_checkpoint(tmp_path, *command, "cluster.processes=2")
    assert "resumed after step" in finish(start(*command, "cluster.processes=2", cwd=tmp_path))
    assert_same_run(the_run(tmp_path), two)
