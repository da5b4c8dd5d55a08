"""Runs with all optional augmentation, with the real program."""

from __future__ import annotations

from pathlib import Path

from conftest import TINY, start
from runs import finish, the_run, train_in
from test_resume import assert_same_bits, stop_run, wait_for_step

COMMAND = (
    *TINY, "batch_size=16", "steps=40", "checkpoint.every_steps=5", "cluster.threads=1",
    "mode.mixup=0.8", "mode.cutmix=1", "mode.mix_per=pair",
    "dataset.resized_crop.scale=[0.3,1]", "dataset.crop_padding=0", "dataset.rotation=0",
    "dataset.image_size=8", "dataset.resize_size=10",
    "dataset.color_jitter.contrast=0.4", "dataset.rand_augment.operations=2",
    "dataset.erasing.probability=0.5", "dataset.erasing.fill=pixel",
)  # fmt: skip


def test_a_killed_run_resumes_exactly(tmp_path: Path) -> None:
    whole = train_in(tmp_path / "whole", *COMMAND)
    folder = tmp_path / "killed"
    folder.mkdir()
    process = start(*COMMAND, cwd=folder)
    wait_for_step(folder, 10, process)
    run = the_run(folder)
    stop_run(run, process, "everything")
    assert "resumed after step" in finish(start(*COMMAND, cwd=folder))
    assert_same_bits(run, whole)
