"""Random damage to any file of a run or of the user, for each command that reads it: a result, or one message.

The damages are the same in each run, unless ``FAULTS_SEED`` is set. ``FAULTS_EXAMPLES`` multiplies their number.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from damage import DAMAGES, Damage
from programs import Programs, assert_ends_in_order
from runs import the_run

MANY = int(os.environ.get("FAULTS_EXAMPLES", "1"))
SEED = os.environ.get("FAULTS_SEED", "0")
OPTIONS = (
    "steps=12", "checkpoint.every_steps=5", "dataset.val_fraction=0.25", "cluster.threads=1", "tracker=wandb",
    "tracker.mode=offline", "tracker.images=true", "tracker.layers_every=2",
)  # fmt: skip
READ = (
    "status.json", "summary.json", "config.yaml", "metrics.jsonl", "metrics.parquet", "layers.parquet", "correct.npz",
    "predictions.parquet", "log.txt", "images.png", "wandb/uploads.json", "wandb/offline-run-*/*.wandb",
    "checkpoints/step-*.pt",
)  # fmt: skip
COMMANDS = (
    ("status", "runs"), ("status", "runs", "--json"), ("report", "runs", "--format", "md", "--out", "-"),
    ("report", "runs", "--out", "page.html"), ("report", "runs", "--format", "csv", "--out", "-"), ("logs", "RUN"),
    ("cancel", "RUN"), ("sync", "RUN", "--dry-run"), ("confirm", "runs", "--dry-run"), ("evaluate", "RUN"),
    ("export", "RUN", "--to", "torch", "--out", "weights.pt"),
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(process: Programs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run with W&B's files."""
    folder = tmp_path_factory.mktemp("whole")
    ended = process.call("launch", *TINY, *OPTIONS, cwd=folder)
    assert ended.code == 0, ended.output
    return the_run(folder)


def copied(run: Path, copy: Path, old: str, new: str) -> Path:
    """Copy a run's folder without W&B's files, with a change of its configuration."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("wandb"))
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(old, new))
    return copy


def some_damages(draw: random.Random) -> Sequence[Damage]:
    return DAMAGES * MANY if MANY > 1 else draw.sample(DAMAGES, 3)


@pytest.mark.timeout(100_000)
@pytest.mark.parametrize("name", READ)
def test_commands_name_a_damaged_file_or_show_it(process: Programs, whole: Path, tmp_path: Path, name: str) -> None:
    draw = random.Random(f"{SEED} {name}")
    run = tmp_path / "runs" / whole.name
    shutil.copytree(whole, run, symlinks=True)
    copied(whole, tmp_path / "runs" / "another", "seed: 0\n", "seed: 1\n")
    path = sorted(run.glob(name))[-1]
    content, status = path.read_bytes(), (run / "status.json").read_bytes()
    for damage in some_damages(draw):
        if name != "status.json" and draw.randrange(2):
            (run / "status.json").write_bytes(status.replace(b'"finished"', b'"running"'))
        damaged = damage(content, draw)
        path.write_bytes(damaged)
        for command in COMMANDS if MANY > 1 else draw.sample(COMMANDS, 3):
            arguments = [str(run) if argument == "RUN" else argument for argument in command]
            ended = process.call("largebatch", *arguments, cwd=tmp_path)
            assert_ends_in_order(ended, (0, 1, 2), f"{damage.__name__} {command} {damaged[:2000]!r}")
        path.write_bytes(content)
        (run / "status.json").write_bytes(status)


@pytest.mark.timeout(100_000)
@pytest.mark.parametrize("name", ["status.json", "config.yaml", "metrics.jsonl", "layers.parquet", "correct.npz"])
def test_a_worker_names_a_damaged_file_or_trains(process: Programs, whole: Path, tmp_path: Path, name: str) -> None:
    """Each time, the run resumes from its second last checkpoint."""
    draw = random.Random(f"{SEED} {name}")
    for number, damage in enumerate(some_damages(draw)):
        run = copied(whole, tmp_path / f"{number}", "  name: wandb\n", "  name: none\n")
        sorted(run.glob("checkpoints/step-*.pt"))[-1].unlink()
        path = run / name
        damaged = damage(path.read_bytes(), draw)
        path.write_bytes(damaged)
        ended = process.call("worker", str(run), cwd=tmp_path)
        assert_ends_in_order(ended, (0, 1, 2), f"{damage.__name__} {damaged[:2000]!r}", run / "log.txt")
        shutil.rmtree(run)


@pytest.mark.timeout(100_000)
@pytest.mark.parametrize("kind", ["sweeps/demo.yaml", "conf/optimizer/lars.yaml", "conf/config.yaml"])
def test_launch_names_a_damaged_file_of_the_user_or_shows_a_plan(process: Programs, tmp_path: Path, kind: str) -> None:
    """The damaged file is in a folder of the user, which Hydra searches too."""
    draw = random.Random(f"{SEED} {kind}")
    folder, _, name = kind.partition("/")
    path = tmp_path / "mine" / (f"sweeps/{name}" if folder == "sweeps" else name.replace("lars", "mine"))
    path.parent.mkdir(parents=True)
    content = (ROOT / kind).read_bytes()
    chosen = {"sweeps/demo.yaml": "sweeps=demo", "conf/optimizer/lars.yaml": "optimizer=mine"}.get(kind, "seed=1")
    for damage in some_damages(draw):
        damaged = damage(content, draw)
        path.write_bytes(damaged)
        grid = ["-m"] if folder == "sweeps" else []
        search = f"hydra.searchpath=[{tmp_path}/mine]"
        ended = process.call("launch", *grid, search, chosen, "dry_run=true", cwd=tmp_path)
        assert_ends_in_order(ended, (0, 2), f"{damage.__name__} {damaged[:3000]!r}")
        assert not (tmp_path / "runs").exists()
