"""The noise scale of a run in two processes, with the real program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import TINY
from runs import train_in
from test_gradient_noise import ON, trained

from largebatch.runs.metrics import read_rows

STEPS = 12
RUN = (*TINY, f"steps={STEPS}", "cluster.threads=1", "cluster.processes=2")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(tmp_path_factory.mktemp("runs") / "on", *RUN, ON)


def test_two_processes_measure_as_two_micro_batches(two_processes: Path, tmp_path: Path) -> None:
    """Both have the same small batches."""
    rows = [row for row in read_rows(two_processes / "metrics.jsonl") if "train/loss" in row]
    (accumulated,), _ = trained(tmp_path / "accumulated", STEPS, "micro_batch=8", ON).train_rows()
    one, other = ({k: v for k, v in row.items() if k.startswith("noise")} for row in (rows[-1], accumulated))
    assert "noise/scale_low" in one
    assert one == pytest.approx(other, rel=0.02, abs=0.1)


def test_two_processes_train_bit_equal_with_and_without(two_processes: Path, tmp_path: Path) -> None:
    off = train_in(tmp_path / "off", *RUN)
    with_it, without = (json.loads((run / "summary.json").read_text())["checksum"] for run in (two_processes, off))
    assert with_it == without
