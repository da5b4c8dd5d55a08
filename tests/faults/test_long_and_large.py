"""A run of many steps and a grid of many runs need no more memory, open files or threads with time.

These tests take minutes, so only ``make soak`` runs them (``FAULTS_LONG=1``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import TINY, environment, start
from runs import the_run, worker_pid

from largebatch.runs.metrics import newest

LONG = pytest.mark.skipif("FAULTS_LONG" not in os.environ, reason="takes minutes; make soak runs it")
MIB = 1 << 20


class Usage(NamedTuple):
    """Resources of a process."""

    resident: int  # bytes
    handles: int  # open files, pipes and sockets
    threads: int


def usage(pid: int) -> Usage | None:
    """Return the present resources of a process, or None if it has ended."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        handles = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return Usage(1024 * int(status["VmRSS"].split()[0]), handles, int(status["Threads"]))
    except (OSError, KeyError):
        return None


Sample = tuple[float, Usage]  # progress, and resources at that time


def watch(process: subprocess.Popen[str], look: Callable[[], dict[str, Sample]], seconds: float) -> dict[str, list]:
    """Return the samples of each process by name, from its start to its end."""
    found: dict[str, list[Sample]] = {}
    while process.poll() is None:
        for name, sample in look().items():
            found.setdefault(name, []).append(sample)
        time.sleep(seconds)
    return found


def assert_flat(
    name: str, samples: Sequence[Sample], early: tuple[float, float], late: tuple[float, float], memory: int
) -> None:
    """Compare the largest values of each resource in the intervals of progress ``early`` and ``late``.

    ``memory``: bytes that the resident memory may differ by.
    """
    before = [sample for at, sample in samples if early[0] <= at < early[1]]
    after = [sample for at, sample in samples if late[0] <= at < late[1]]
    assert len(before) > 3
    assert len(after) > 3
    most = [Usage(*map(max, zip(*part, strict=True))) for part in (before, after)]
    print(f"{name}: {most[0]}, later {most[1]}")
    assert most[1].resident <= most[0].resident + memory
    assert most[1].handles <= most[0].handles
    assert most[1].threads <= most[0].threads


@LONG
@pytest.mark.timeout(3600)
def test_a_run_of_5000_steps_stays_flat(tmp_path: Path) -> None:
    """The run evaluates 50 times, saves 100 checkpoints and writes 250 layer rows."""
    options = ("steps=5000", "eval_every=25", "checkpoint.every_steps=50", "cluster.threads=1")
    process = start(*TINY, *options, cwd=tmp_path)

    def look() -> dict[str, Sample]:
        if not list(tmp_path.glob("runs/*/metrics.jsonl")):
            return {}
        run = the_run(tmp_path)
        step = newest(run / "metrics.jsonl", "step") or 0
        pids = {"launcher": process.pid, "worker": worker_pid(run)}
        return {name: (step, found) for name, pid in pids.items() if (found := usage(pid))}

    samples = watch(process, look, seconds=0.3)
    assert process.returncode == 0
    for name in ("launcher", "worker"):
        assert_flat(name, samples[name], early=(500, 2000), late=(4000, 5000), memory=8 * MIB)
    log = (the_run(tmp_path) / "log.txt").read_text()
    print(f"log.txt: {len(log)} bytes")
    assert len(log) < 2000


@LONG
@pytest.mark.timeout(7200)
def test_a_grid_of_500_runs_stays_flat_and_is_reported(tmp_path: Path) -> None:
    options = ("steps=1", "cluster.threads=1", "cluster.parallel=2", "tracker.layers_every=0")
    with (tmp_path / "out").open("w") as out:
        process = start("-m", *TINY, *options, "seed=range(500)", cwd=tmp_path, stdout=out, stderr=out)

    def look() -> dict[str, Sample]:
        done = len(list(tmp_path.glob("runs/*/summary.json")))
        found = usage(process.pid)
        return {"launcher": (done, found)} if found else {}

    samples = watch(process, look, seconds=1.0)
    assert process.returncode == 0
    assert_flat("launcher", samples["launcher"], early=(50, 200), late=(400, 500), memory=8 * MIB)
    seconds = {}
    printed = {}
    for command in (["status", "--json"], ["report", "--format", "md", "--out", "-"]):
        began = time.monotonic()
        arguments = [sys.executable, "-m", "largebatch.cli", *command]
        printed[command[0]] = subprocess.run(
            arguments, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120, check=True
        ).stdout
        seconds[command[0]] = time.monotonic() - began
    print(seconds)
    assert [row["state"] for row in json.loads(printed["status"])] == 500 * ["finished"]
    assert "500" in printed["report"]
