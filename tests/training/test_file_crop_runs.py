"""Runs that crop JPEGs in ImageNet's layout or in Arrow shards while they are decoded, with the real program."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Launch, start
from datafiles import make_arrow, make_imagefolder
from programs import Programs
from runs import finish, kill_after_checkpoint, parameters, the_run, timeless, train_in
from same_run import assert_same_run
from test_bt_resume import as_if_killed

from largebatch.runs.metrics import read_rows

STEPS, SAVED = 16, 8
RECIPE = (
    "dataset=imagenet", "dataset.train_size=64", "dataset.test_size=8", "dataset.num_classes=4", "dataset.workers=2",
    "dataset.image_size=8", "dataset.resize_size=10", "dataset.crop_padding=0",
    "dataset.resized_crop.scale=[0.3,1]", "dataset.resized_crop.source=file",
    "dataset.color_jitter.brightness=0.4", "dataset.rand_augment.operations=1", "dataset.erasing.probability=0.5",
    "mode.mixup=0.2", "optimizer=lars", "optimizer.lr=0.5", "batch_size=16", f"steps={STEPS}",
    "checkpoint.every_steps=8", "tracker=none", "tracker.log_every=4", "cluster.threads=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    root = make_imagefolder(
        tmp_path_factory.mktemp("images"), (40, 32), classes=tuple("abcd"), train_per_class=16, test_per_class=2,
        test_name="val", extension=".JPEG",
    )  # fmt: skip
    return (*RECIPE, f"dataset.root={root}")


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


def test_the_speed_of_decoding_is_logged_and_the_plan_shows_it(
    command: tuple[str, ...], whole: Path, launch: Launch
) -> None:
    row = read_rows(whole / "metrics.jsonl")[-2]
    assert row["perf/decoded_images_per_second"] > 0
    assert 0 <= row["perf/data_share"] <= 1
    summary = json.loads((whole / "summary.json").read_text())
    assert (summary["data_location"], summary["decoding_processes"]) == ("files", 2)
    planned = launch(*command, f"runs_dir={whole.parent}", "seed=1", "dry_run=true").stdout.split()
    decoded = f"{2 * summary['decoded_images_per_second']:,.0f},"
    words = f"images/s, and 2 decoding process(es) decode {decoded} measured in {whole.name}".split()
    at = planned.index("decoding") - 3
    assert planned[at : at + len(words)] == words


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_shards_train_as_the_files_do_and_resume_exactly(
    tmp_path: Path, command: tuple[str, ...], whole: Path, process: Programs, processes: int
) -> None:
    """Parameters are equal bit for bit. Shards have the statistics and the augmentation of ``dataset=imagenet``."""
    tree = Path(command[-1].partition("=")[2])
    root = make_arrow(tree.with_name(f"shards{processes}"), tree, shards=3)
    shards = ("dataset=arrow", f"dataset.root={root}", "dataset.rotation=0")
    statistics = ("dataset.mean=[0.485,0.456,0.406]", "dataset.std=[0.229,0.224,0.225]")
    from_shards = (*shards, *statistics, *RECIPE[4:], f"cluster.processes={processes}")
    run = process.train(tmp_path / "whole", *from_shards)
    files = whole if processes == 1 else process.train(tmp_path / "files", *command, f"cluster.processes={processes}")
    found, expected = parameters(run), parameters(files)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert timeless(run) == timeless(files)

    stopped = shutil.copytree(run, tmp_path / "runs" / run.name)
    as_if_killed(stopped, SAVED)
    assert process.train(tmp_path, *from_shards) == stopped
    assert f"resumed after step {SAVED} of {STEPS}" in (stopped / "log.txt").read_text()
    assert_same_run(stopped, run)


def test_images_decoded_ahead_of_a_growing_batch_are_those_of_its_steps(
    tmp_path: Path, command: tuple[str, ...], process: Programs
) -> None:
    """A decoding process reads two batches ahead, and the norm test changes the batches that follow."""
    growing = (
        *(key for key in command if not key.startswith("steps=")), "epochs=3", "batch_size=32", "tracker.log_every=1",
        "batch_schedule.shape=norm_test", "batch_schedule.start=8", "batch_schedule.eta=0.9",
    )  # fmt: skip
    runs = [process.train(tmp_path / n, *growing, f"dataset.workers={n}") for n in ("0", "1")]
    rows = read_rows(runs[0] / "metrics.jsonl")
    assert len({row["optim/batch_size"] for row in rows if "optim/batch_size" in row}) > 1
    assert len({json.loads((run / "summary.json").read_text())["checksum"] for run in runs}) == 1


@pytest.mark.slow
def test_two_processes_train_the_same_and_resume_exactly_after_a_kill(
    tmp_path: Path, command: tuple[str, ...], whole: Path
) -> None:
    two = train_in(tmp_path / "two", *command, "cluster.processes=2")
    expected, found = parameters(whole), parameters(two)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    kill_after_checkpoint(tmp_path, *command, "cluster.processes=2")
    assert "resumed after step" in finish(start(*command, "cluster.processes=2", cwd=tmp_path))
    assert_same_run(the_run(tmp_path), two)
