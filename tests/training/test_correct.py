"""``correct.npz``: the correct test images of the last and the best evaluation, with any number of processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from programs import Programs

from largebatch.runs.correct import read_correct, write_correct
from largebatch.runs.folder import RunFolder

LEARNS = (*TINY, "dataset.val_fraction=0.25", "epochs=3", "precision=fp32")


def test_the_bits_are_those_of_the_reported_accuracies(tmp_path: Path, process: Programs) -> None:
    runs = [process.train(tmp_path / str(n), *LEARNS, f"cluster.processes={n}") for n in (1, 2)]
    found = [read_correct(run / "correct.npz") for run in runs]
    for run, bits in zip(runs, found, strict=True):
        summary = RunFolder(run).read_summary()
        assert bits["last"].mean() == pytest.approx(summary["test/accuracy"], abs=1e-12)
        assert bits["best"].mean() == pytest.approx(summary["best/test/accuracy"], abs=1e-12)
    assert np.array_equal(found[0]["last"], found[1]["last"])


def test_the_best_evaluation_stays_until_a_better_one(tmp_path: Path) -> None:
    file = tmp_path / "correct.npz"
    bits = np.eye(3, 11, dtype=bool)
    for step, accuracy in enumerate((0.5, 0.7, 0.7)):
        write_correct(file, step, accuracy, bits[step])
    assert np.array_equal(read_correct(file)["best"], bits[1])
    assert np.array_equal(read_correct(file)["last"], bits[2])
    write_correct(file, 1, 0.7, bits[0])  # a resumed run repeats the evaluation
    assert np.array_equal(read_correct(file)["best"], bits[0])
    assert [path.name for path in tmp_path.iterdir()] == ["correct.npz"]
