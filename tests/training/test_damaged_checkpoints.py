"""Damaged, foreign or incomplete checkpoints are named, and the checkpoint before is taken."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from conftest import TINY
from programs import Programs
from runs import parameters, timeless

from largebatch.training.checkpoint import checkpoint_path, load_newest, save_checkpoint

CPU = torch.device("cpu")
COMMAND = (*TINY, "steps=20", "checkpoint.every_steps=5", "tracker.layers_every=5", "cluster.threads=1")


def flip(content: bytearray, draw: random.Random) -> None:
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


def zero(content: bytearray, draw: random.Random) -> None:
    """Clear up to 4 KiB, as a disk that lost a page does."""
    start = draw.choice([i for i in draw.choices(range(len(content)), k=100) if content[i]])
    content[start : start + 4096] = bytes(min(4096, len(content) - start))


def truncate(content: bytearray, draw: random.Random) -> None:
    del content[draw.randrange(len(content)) :]


def duplicate(content: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(content))
    content[start:start] = content[start : start + draw.randrange(1, 512)]


@pytest.mark.parametrize("damage", [flip, zero, truncate, duplicate])
def test_every_damage_is_recognised(tmp_path: Path, damage: Callable[[bytearray, random.Random], None]) -> None:
    draw = random.Random(0)
    torch.manual_seed(0)
    save_checkpoint(tmp_path, 1, {"weights": torch.randn(2000)}, "run")
    whole = save_checkpoint(tmp_path, 2, {"weights": torch.randn(2000)}, "run").read_bytes()
    for _ in range(60):
        content = bytearray(whole)
        damage(content, draw)
        checkpoint_path(tmp_path, 2).write_bytes(content)
        messages: list[str] = []
        state = load_newest(tmp_path, CPU, messages.append, "run")
        assert state is not None
        assert state["step"] == 1
        assert [message.split()[0] for message in messages] == [str(checkpoint_path(tmp_path, 2))]
        assert "\n" not in messages[0]


def of_another_run(folder: Path) -> None:
    save_checkpoint(folder, 2, {"weights": torch.ones(1)}, "other")


def of_another_step(folder: Path) -> None:
    shutil.copy(checkpoint_path(folder, 1), checkpoint_path(folder, 2))


def without_a_key(folder: Path) -> None:
    save_checkpoint(folder, 2, {}, "run")


def without_a_checksum(folder: Path) -> None:
    torch.save({"step": 2, "weights": torch.ones(1)}, checkpoint_path(folder, 2))


def a_folder(folder: Path) -> None:
    checkpoint_path(folder, 2).mkdir()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (of_another_run, "belongs to another run (other)"),
        (of_another_step, "is the checkpoint of step 1"),
        (without_a_key, "has no weights"),
        (without_a_checksum, "has no checksum"),
        (a_folder, "Is a directory"),
    ],
)
def test_a_checkpoint_that_is_not_the_run_s_is_named(tmp_path: Path, make: Callable[[Path], None], reason: str) -> None:
    save_checkpoint(tmp_path, 1, {"weights": torch.ones(1)}, "run")
    make(tmp_path)
    messages: list[str] = []
    state = load_newest(tmp_path, CPU, messages.append, "run", needs=["weights"])
    assert state is not None
    assert state["step"] == 1
    (message,) = messages
    assert reason in message


def test_an_unreadable_only_checkpoint_is_an_error_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    """A disk may be readable again; the run must not start again meanwhile."""
    a_folder(tmp_path)
    with pytest.raises(OSError, match="Is a directory"):
        load_newest(tmp_path, CPU, lambda message: None)
    checkpoint_path(tmp_path, 2).rmdir()
    checkpoint_path(tmp_path, 2).write_bytes(b"")
    messages: list[str] = []
    assert load_newest(tmp_path, CPU, messages.append) is None
    assert "starts again from step 0" in messages[-1]


def test_a_save_replaces_later_checkpoints_that_were_not_usable(tmp_path: Path) -> None:
    for step in (10, 20):
        checkpoint_path(tmp_path, step).write_bytes(b"damaged")
    save_checkpoint(tmp_path, 5, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005.pt"]


def test_the_best_checkpoint_appears_before_the_checkpoint_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the renames leaves a run that evaluates the best model again."""
    best, order, replace = tmp_path / "best.pt", [], os.replace

    def observed(source: Any, target: Any) -> None:
        order.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", observed)
    path = save_checkpoint(tmp_path, 3, {"best": 0.5}, best=best)
    assert order == ["best.pt", path.name]
    assert best.read_bytes() == path.read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, process: Programs) -> Path:
    return process.train(tmp_path_factory.mktemp("runs"), *COMMAND)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def without_accuracy(path: Path) -> None:
    """Damage the accuracy's checksum, which only the next better evaluation would read."""
    content = path.read_bytes()
    at = content.rindex(b"accuracy.npy")  # in the list of contents, where the CRC-32 is 30 bytes before the name
    path.write_bytes(content[: at - 30] + bytes(4) + content[at - 26 :])


@pytest.mark.parametrize(
    ("name", "damage", "resumes"),
    [
        ("checkpoints/step-00000020.pt", flipped, "resumed after step 15"),
        ("layers.parquet", Path.unlink, "starts again from step 0"),
        ("layers.parquet", cut, "starts again from step 0"),
        ("metrics.jsonl", cut, "starts again from step 0"),
        ("metrics.jsonl", flipped, "starts again from step 0"),
        ("correct.npz", cut, "starts again from step 0"),
        ("correct.npz", without_accuracy, "starts again from step 0"),
    ],
)
def test_a_run_with_a_damaged_file_ends_like_an_undisturbed_run(
    tmp_path: Path, process: Programs, whole: Path, name: str, damage: Callable[[Path], None], resumes: str
) -> None:
    run = tmp_path / "runs" / whole.name
    shutil.copytree(whole, run)
    damage(run / name)
    (run / "status.json").write_text('{"state": "running"}')
    (run / ".status.json.1.tmp").write_text("{")
    assert process.train(tmp_path, *COMMAND) == run
    resumed = (run / "log.txt").read_text().removeprefix((whole / "log.txt").read_text())
    assert resumes in resumed
    assert Path(name).name in resumed
    assert not list(run.rglob("*.tmp"))
    ours, theirs = parameters(run), parameters(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert timeless(run) == timeless(whole)
    tables = [pyarrow.parquet.read_table(folder / "layers.parquet") for folder in (run, whole)]
    assert tables[0].equals(tables[1])
    assert (run / "correct.npz").read_bytes() == (whole / "correct.npz").read_bytes()
