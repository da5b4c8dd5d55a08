"""A random signal to a random process of a run at a random time, and then the same command: bit for bit the same run.

``FAULTS_SIGNALS`` is the number of tries for each way of running, ``FAULTS_SEED`` chooses them.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, start
from runs import finish, is_alive
from same_run import assert_same_run, top_of

COUNT = int(os.environ.get("FAULTS_SIGNALS", "1"))
SEED = os.environ.get("FAULTS_SEED", "0")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
WANDB = ("tracker=wandb", "tracker.mode=offline", "tracker.images=true")
COMMON = (*TINY, "checkpoint.every_steps=3", "tracker.layers_every=2", "cluster.threads=1")
RUNS = {
    "one process": (*COMMON, "steps=200", "optimizer=tvlars", "dataset.val_fraction=0.2"),
    "two processes": (*COMMON, "steps=60", "optimizer=lamb", "cluster.processes=2"),
    "barlow twins": (*COMMON, "steps=60", "mode=bt", "mode.projector=[16,16]", "mode.eval_epochs=5"),
    "packed grid": ("-m", *COMMON, "steps=60", "cluster.parallel=2", "seed=0,1,2"),
    "wandb": (*COMMON, "steps=200", *WANDB),
}
if COUNT > 1:  # compiling takes half a minute
    RUNS["compiled"] = (*COMMON, "steps=60", "compile=true")


def descendants(pid: int) -> list[int]:
    """Return a process and all below it."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


@pytest.fixture(scope="module", params=RUNS)
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The overrides of a run or a grid, its working directory, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("whole")
    for _ in range(1 + ("compile=true" in RUNS[request.param])):  # the first compiles into the cache
        shutil.rmtree(folder / "runs", ignore_errors=True)
        began = time.monotonic()
        finish(start(*RUNS[request.param], cwd=folder))
    return request.param, folder, time.monotonic() - began


@pytest.mark.parametrize("number", range(COUNT))
def test_a_random_signal_loses_nothing(undisturbed: tuple[str, Path, float], number: int, tmp_path: Path) -> None:
    name, whole, seconds = undisturbed
    draw = random.Random(f"{SEED} {name} {number}")
    launcher = start(*RUNS[name], cwd=tmp_path)
    time.sleep(draw.uniform(0.05, 1.0) * seconds)
    processes = descendants(launcher.pid)
    target, sent = draw.choice(processes), draw.choice(SIGNALS)
    if launcher.poll() is None and is_alive(target):
        os.kill(target, sent)
    out = launcher.communicate(timeout=500)
    deadline = time.monotonic() + 30
    while any(is_alive(pid) for pid in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in processes if is_alive(pid)], (sent, out)
    finish(start(*RUNS[name], cwd=tmp_path))
    assert top_of(tmp_path) == top_of(whole)
    for run in whole.glob("runs/*"):
        assert_same_run(tmp_path / "runs" / run.name, run)
