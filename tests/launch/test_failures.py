"""Failures of disks and data while training: the run is kept, and the message names the cause."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, configuration, start
from PIL import Image
from programs import Programs
from runs import the_run

from largebatch.config.typed import to_yaml
from largebatch.errors import UserError
from largebatch.launch import local
from largebatch.launch.devices import resolve_devices
from largebatch.launch.local import Outcome, Started, claim, conclude
from largebatch.launch.plan import PlannedRun
from largebatch.machine.pulse import Watch
from largebatch.runs.folder import RunFolder

IMAGES = (
    "dataset=imagefolder", "dataset.image_size=8", "model=smallcnn", "batch_size=4", "epochs=20", "tracker=none",
    "dataset.workers=1", "cluster.threads=1", "checkpoint.every_steps=1",
)  # fmt: skip


# Leaves the images in their files, as for a data set that is larger than the memory.
LITTLE_MEMORY = """
import sys
if "largebatch.training.worker" in sys.orig_argv:
    import largebatch.data.load
    largebatch.data.load.host_memory = lambda: 0
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Folder on a disk of 900 kB: enough for one checkpoint of ``TINY``."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=900k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mounted, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_named_the_grid_ends_in_order_and_a_run_resumes_when_there_is_room(
    tmp_path: Path, process: Programs, small_disk: Path
) -> None:
    command = (*TINY, "steps=30", "checkpoint.every_steps=5", f"runs_dir={small_disk}/runs")
    launcher = start(*command, "seed=0,1", "-m", cwd=tmp_path)
    out, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 1, out + errors
    assert "Traceback" not in out + errors
    failures = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert failures
    assert all("No space left on device" in line for line in failures), errors
    assert "the same command resumes" in failures[0]
    assert not list(small_disk.rglob("*.tmp"))
    assert list(small_disk.rglob("*-s0-*/**/step-*.pt"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    run = process.train(tmp_path, *command)
    assert "resumed after step 5 of 30" in (run / "log.txt").read_text()


@pytest.mark.slow
def test_an_image_that_becomes_unreadable_fails_the_run_and_keeps_its_folder(
    tmp_path: Path, process: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(LITTLE_MEMORY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]))
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("a", "b"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for number in range(8):
                Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    command = (*IMAGES, f"dataset.root={tmp_path / 'data'}")
    launcher = start(*command, cwd=tmp_path)
    while not list(tmp_path.glob("runs/*/checkpoints/step-*.pt")):
        assert launcher.poll() is None, launcher.communicate()
    victim = tmp_path / "data" / "train" / "a" / "0.png"
    content = victim.read_bytes()
    victim.write_bytes(b"gone")
    _, errors = launcher.communicate(timeout=100)
    assert launcher.returncode == 1
    run = the_run(tmp_path)
    assert str(victim) in errors
    assert "the same command resumes" in errors
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    assert list(run.glob("checkpoints/step-*.pt"))
    assert "Traceback" not in (run / "log.txt").read_text()
    victim.write_bytes(content)
    assert process.train(tmp_path, *command) == run
    assert "resumed after step" in (run / "log.txt").read_text()


@pytest.mark.parametrize("moved", range(5))
def test_a_repetition_killed_while_it_sets_the_result_aside_keeps_one_result(tmp_path: Path, moved: int) -> None:
    """The kill comes after ``moved`` renames. The next start completes the move."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    names = ["config.yaml", "metrics.jsonl", "summary.json"]
    for name in names:
        (folder.path / name).write_text("first")
    (folder.path / "previous-1").mkdir()
    folder.update_status(state="finished")
    files = [*names, "status.json"]
    (folder.path / "moving").mkdir()
    for name in files[:moved]:
        (folder.path / name).rename(folder.path / "moving" / name)
    config = configuration(*TINY)
    assert claim(PlannedRun(config, folder, "")) is None
    assert {path.name for path in folder.path.iterdir()} == {
        "config.yaml", "status.json", "lock", "previous-1", "previous-2",
    }  # fmt: skip
    assert sorted(path.name for path in (folder.path / "previous-2").iterdir()) == sorted(files)
    assert folder.read_status()["repetition"] == 2
    assert folder.state() == "queued"


def test_a_launcher_that_cannot_open_the_log_fails_the_run_with_the_cause(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.log.mkdir(parents=True)
    outcome = local.start(PlannedRun(configuration(*TINY), folder, ""), {}, speaking=False)
    assert isinstance(outcome, Outcome)
    assert (outcome.state, outcome.exit_code) == ("failed", 1)
    assert "Is a directory" in outcome.message
    assert (folder.state(), folder.read_status()["message"]) == ("failed", outcome.message)


def test_a_worker_that_cannot_open_the_log_fails_the_run_with_the_cause(tmp_path: Path, process: Programs) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.log.mkdir(parents=True)
    folder.config.write_text(to_yaml(configuration(*TINY)))
    folder.update_status(state="queued", message="", exit_code=0)
    worker = process.call("worker", str(folder.path), cwd=tmp_path)
    assert (worker.code, worker.stderr) == (1, "")
    assert "Is a directory" in folder.read_status()["message"]


@pytest.mark.parametrize("kept", [None, "metrics.jsonl", "previous-1/metrics.jsonl"])
def test_a_run_that_fails_before_any_result_leaves_no_folder(tmp_path: Path, kept: str | None) -> None:
    """The folder may exist before the start: a kill in the middle of its removal leaves a part of it."""
    folder = RunFolder(tmp_path / "runs" / "run")
    folder.path.mkdir(parents=True)
    folder.update_status(state="failed", message="dataset.root: no such folder", exit_code=2)
    if kept:
        (folder.path / kept).parent.mkdir(exist_ok=True)
        (folder.path / kept).write_text("{}\n")
    child = subprocess.Popen(["true"], start_new_session=True)
    conclude(Started(PlannedRun(configuration(*TINY), folder, ""), child, Watch(range(1), 100), 0))
    assert (tmp_path / "runs").exists() == (kept is not None)


def test_torchrun_binds_the_processes_of_this_machine(
    four_gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Look only at the command line: these GPUs don't exist."""
    config = configuration(*TINY, "cluster.numa_binding=node", "cluster.processes=2")
    path, driver = os.environ["PATH"], os.environ["PATH"].partition(":")[0]
    monkeypatch.setenv("PATH", driver)
    with pytest.raises(UserError, match=r"cluster.numa_binding=node: needs numactl, which isn't on PATH here"):
        resolve_devices(config)
    (tmp_path / "numactl").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{path}")
    resolve_devices(config)
    started = local.start(PlannedRun(config, RunFolder(tmp_path / "run"), ""), {}, speaking=False)
    assert isinstance(started, Started)
    local.stop([started], at_once=lambda: True, by="the test")
    assert {"--nproc-per-node=2", "--numa-binding=node"} <= {*started.child.args}
