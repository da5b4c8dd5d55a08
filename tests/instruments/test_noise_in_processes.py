"""The noise scale in two processes, with several numbers of micro-batches, and resumed."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
from conftest import TINY
from programs import Programs
from runs import timeless
from test_gradient_noise import ON

from largebatch.runs.metrics import Row

RUN = (*TINY, "steps=32", "cluster.threads=1", "checkpoint.every_steps=5")
TWO = (*RUN, "cluster.processes=2")
ACCUMULATIONS = (2, 4, 8)


def noise(run: Path) -> Row:
    """Return the noise metrics of the last training row."""
    rows = [row for row in timeless(run) if "train/loss" in row]
    return {name: value for name, value in rows[-1].items() if name.startswith("noise")}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory, process: Programs) -> Path:
    return process.train(tmp_path_factory.mktemp("runs"), *TWO, ON)


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory: pytest.TempPathFactory, process: Programs) -> dict[int, Path]:
    """Runs by their number of micro-batches."""
    return {
        parts: process.train(tmp_path_factory.mktemp("runs"), *RUN, f"micro_batch={16 // parts}", ON)
        for parts in ACCUMULATIONS
    }


def test_two_processes_measure_as_two_micro_batches(two_processes: Path, accumulated: dict[int, Path]) -> None:
    """Both have the same small batches."""
    one, other = noise(two_processes), noise(accumulated[2])
    assert {"noise/scale_low", "noise/variance", "noise/cosine"} <= one.keys()
    assert one == pytest.approx(other, rel=0.02, abs=0.1)


def test_divisions_of_the_batch_agree_within_their_intervals(two_processes: Path, accumulated: dict[int, Path]) -> None:
    for one, other in itertools.permutations(map(noise, (two_processes, *accumulated.values())), 2):
        for name in ("noise/scale", "noise/cosine"):
            assert one[f"{name}_low"] <= other[name] <= one.get(f"{name}_high", math.inf)
        assert other["noise/variance"] == pytest.approx(one["noise/variance"], rel=0.2)
        assert other["noise/cosine"] == pytest.approx(one["noise/cosine"], abs=1e-3)  # of the same gradients


def test_two_processes_train_bit_equal_with_and_without(two_processes: Path, process: Programs, tmp_path: Path) -> None:
    off = process.train(tmp_path, *TWO)
    with_it, without = (json.loads((run / "summary.json").read_text())["checksum"] for run in (two_processes, off))
    assert with_it == without


def test_a_killed_run_resumes_to_the_same_rows(two_processes: Path, process: Programs, tmp_path: Path) -> None:
    killed = process.kill(tmp_path, 18, *TWO, ON)
    assert process.train(tmp_path, *TWO, ON) == killed
    assert "resumed after step" in (killed / "log.txt").read_text()
    assert timeless(killed) == timeless(two_processes)
