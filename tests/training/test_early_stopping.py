"""Early stopping on validation accuracy (``early_stopping``)."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from conftest import TINY
from programs import Programs
from same_run import assert_same_run
from test_bt import status_of, summary_of
from test_bt_resume import as_if_killed

from largebatch.runs.metrics import Row, read_rows
from largebatch.runs.predictions import read_predictions
from largebatch.training.stop import EarlyStopping

# Synthetic labels are random, so validation accuracy soon stops to rise.
RUN = (
    *TINY, "dataset.val_fraction=0.25", "early_stopping=3", "epochs=60", "checkpoint.every_steps=3", "optimizer=sgd",
    "optimizer.lr=0.05", "tracker.log_every=50", "tracker.layers_every=7", "cluster.threads=1",
)  # fmt: skip


@pytest.mark.parametrize(
    ("accuracies", "patience", "stop"),
    [
        ([0.5, 0.4, 0.5, 0.5, 0.6], 3, 4),  # an equal accuracy isn't better
        ([0.5, 0.4, 0.6, 0.5, 0.5, 0.5], 3, 6),  # a better accuracy begins a new count
        ([0.1, 0.2, 0.3, 0.4], 1, None),
        ([0.0, 0.0], 1, 2),  # the first is always the best so far
        ([0.5] * 10, None, None),
    ],
)
def test_the_count_of_evaluations_without_a_better_accuracy(
    accuracies: list[float], patience: int | None, stop: int | None
) -> None:
    stopping = EarlyStopping(patience)
    stops = []
    for number, accuracy in enumerate(accuracies, 1):
        resumed = EarlyStopping(patience)
        resumed.load(stopping.state())
        stopping = resumed
        stopping.evaluated({"val/accuracy": accuracy, "test/accuracy": number / 10})
        stops += [number] * stopping.stops
    assert stops == ([] if stop is None else [stop])


def expected_stop(rows: list[Row], patience: int) -> int:
    """Return the step at which the evaluations of a run must have stopped it."""
    best, waited = -math.inf, 0
    for row in rows:
        if "val/accuracy" in row:
            best, waited = max(best, row["val/accuracy"]), 0 if row["val/accuracy"] > best else waited + 1
            if waited == patience:
                return int(row["step"])
    raise AssertionError("the accuracy rose until the end")


@pytest.fixture(scope="module", params=[1, 2])
def stopped_early(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, process: Programs
) -> tuple[Path, list[str]]:
    command = [*RUN, f"cluster.processes={request.param}"]
    return process.train(tmp_path_factory.mktemp("runs"), *command), command


def test_a_run_stops_and_tells_it(stopped_early: tuple[Path, list[str]]) -> None:
    run, _ = stopped_early
    rows, summary, status = read_rows(run / "metrics.jsonl"), summary_of(run), status_of(run)
    step = expected_stop(rows, 3)
    assert (summary["state"], summary["step"], summary["stopped_early"]) == ("finished", step, True)
    assert step < summary["steps"] == 180
    assert max(row["step"] for row in rows) == step
    assert status["message"] == "stopped early: val/accuracy wasn't higher in the last 3 evaluations"
    assert status["message"] in (run / "log.txt").read_text()
    trained = [row["step"] for row in rows if "train/loss" in row]
    assert trained[-1] == step  # every step's training metrics are in a row
    predictions = read_predictions(run / "predictions.parquet")
    assert (predictions.prediction == predictions.label).mean() == pytest.approx(summary["test/accuracy"])
    assert (run / "checkpoints" / f"step-{step:08d}.pt").exists()


def test_a_run_that_stops_early_resumes_to_the_same_stop(
    tmp_path: Path, process: Programs, stopped_early: tuple[Path, list[str]]
) -> None:
    """Also if it is killed between its last checkpoint and its outcome."""
    whole, command = stopped_early
    steps = sorted(int(path.stem.removeprefix("step-")) for path in (whole / "checkpoints").iterdir())
    for step in steps:
        run = tmp_path / f"{step}" / "runs" / whole.name
        shutil.copytree(whole, run)
        as_if_killed(run, step)
        assert process.train(tmp_path / f"{step}", *command) == run
        assert f"resumed after step {step} of 180" in (run / "log.txt").read_text()
        assert status_of(run)["message"].startswith("stopped early")
        assert json.loads((run / "summary.json").read_text())["stopped_early"] is True
        assert_same_run(run, whole)


def test_a_run_of_full_length_has_not_stopped_early(tmp_path: Path, process: Programs) -> None:
    run = process.train(tmp_path, *RUN, "early_stopping=1000", "epochs=2")
    assert summary_of(run)["stopped_early"] is False
    assert status_of(run)["message"] == ""
