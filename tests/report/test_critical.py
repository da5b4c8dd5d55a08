"""Critical batch sizes: steps to a target that follow the hyperbola give it back."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import environment
from made_runs import made, write_run

from largebatch.errors import UserError
from largebatch.report.best_lr import Estimate
from largebatch.report.chart import styles
from largebatch.report.compare import compare
from largebatch.report.critical import Critical, critical, criticals
from largebatch.report.critical_figure import critical_chart
from largebatch.report.curves import Histories
from largebatch.report.load import Run
from largebatch.report.targets import Target, time_to_target

BATCHES = (32, 128, 512, 2048, 8192)
FEWEST, CRITICAL = 400, 700.0


def hyperbola(batch: int) -> float:
    return FEWEST * (1 + CRITICAL / batch)


def history(run: Run, step: float, every: float = 0.01) -> list[dict[str, float]]:
    """Return rows of a run that reaches the target after ``step`` steps, with evaluations every ``every * step``."""
    batch, points = run.config["batch_size"], [(step * (1 - every), 0.1), (step, 0.9)]
    rows = [
        {"step": at, "epoch": 1.0, "examples": at * batch, "wall_seconds": 1.0, "test/accuracy": accuracy}
        for at, accuracy in points if math.isfinite(at)
    ]  # fmt: skip
    return [*rows, {"step": 1e9, "epoch": 2.0, "examples": 1, "wall_seconds": 2.0, "test/accuracy": 0.0}]


def reached(steps: dict[int, list[float]], every: float = 0.01) -> Critical:
    """Return the result of one row whose seeds reached the target after these steps, for each batch size.

    Args:
        every: steps between evaluations, relative to the steps to the target.
    """
    runs: list[Run] = []
    histories: Histories = {}
    for batch, of_seeds in steps.items():
        for seed, step in enumerate(of_seeds):
            run = made("sgd", batch=batch, seed=seed)
            runs.append(run)
            histories[run.name] = history(run, step, every)
    (comparison,) = compare(runs)
    times = time_to_target(comparison, histories, Target(0.5))
    assert times is not None
    (found,) = criticals(comparison, times, [])
    return found


def test_steps_on_the_hyperbola_give_its_critical_batch_size_back() -> None:
    found = reached({batch: [hyperbola(batch)] for batch in BATCHES})
    for estimate, truth in (
        (found.batch_size, CRITICAL), (found.steps, FEWEST), (found.images, FEWEST * CRITICAL),
    ):  # fmt: skip
        assert estimate is not None
        assert estimate.value == pytest.approx(truth, rel=0.02)
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.low < truth < estimate.high
    assert found.words.startswith("beyond a batch size of 699 (")
    assert found.words.endswith("more devices help little: there, training takes twice the fewest possible steps and "
                                "twice the fewest images")  # fmt: skip


def test_the_interval_covers_the_critical_batch_size() -> None:
    random = np.random.default_rng(0)
    covered = []
    for _ in range(100):
        steps = {batch: [hyperbola(batch) * math.exp(0.1 * random.normal())] for batch in BATCHES}
        found = reached(steps).batch_size
        assert found is not None
        covered.append((found.low or 0.0) < CRITICAL < (found.high or math.inf))
    assert np.mean(covered) > 0.85


def test_rare_evaluations_widen_the_interval_and_count_half_of_their_distance() -> None:
    fine = reached({batch: [hyperbola(batch)] for batch in BATCHES})
    rare = reached({batch: [hyperbola(batch)] for batch in BATCHES}, every=0.5)
    assert [time.steps for time in rare.times] == [pytest.approx(0.75 * hyperbola(batch)) for batch in BATCHES]
    assert rare.times[0].deviation > fine.times[0].deviation
    assert rare.batch_size is not None
    assert fine.batch_size is not None
    assert (rare.batch_size.high or math.inf) > (fine.batch_size.high or math.inf)


def test_steps_that_fall_like_1_over_b_or_not_at_all_limit_the_critical_batch_size_on_one_side() -> None:
    falling = reached({batch: [1e6 / batch] for batch in BATCHES})
    assert falling.words.startswith("more devices help at all batch sizes tried; the critical one is above ")
    constant = reached({batch: [500.0] for batch in BATCHES})
    assert constant.words.startswith("more devices help at none of the batch sizes tried; the critical one is below ")


def test_a_limit_among_the_batch_sizes_tried_tells_nothing_of_the_others() -> None:
    """With an evaluation only at the target, the steps before it are anywhere from 0 on."""
    few = BATCHES[:3]
    falling = reached({batch: [1e6 / batch] for batch in few}, every=1.0)
    constant = reached({batch: [500.0] for batch in few}, every=1.0)
    assert falling.batch_size is not None
    assert constant.batch_size is not None
    assert (falling.batch_size.low or 0.0) < few[-1]
    assert falling.words.startswith("more devices help at least up to a batch size of ")
    assert (constant.batch_size.high or 0.0) > few[0]
    assert re.fullmatch(r"beyond a batch size of \S+ at the latest, more devices help little", constant.words)


def test_batch_sizes_whose_median_seed_never_reaches_the_target_are_left_out() -> None:
    steps = {batch: [hyperbola(batch)] * 3 for batch in BATCHES}
    found = reached(steps | {8192: [hyperbola(8192), math.inf, math.inf]})
    assert [time.steps is None for time in found.times] == [False] * 4 + [True]
    assert found.times[-1].seeds == "1 of 3 seeds"
    assert found.batch_size is not None
    assert found.batch_size.value == pytest.approx(CRITICAL, rel=0.02)
    few = reached({batch: [hyperbola(batch)] for batch in BATCHES[:2]})
    assert few.batch_size is None
    assert few.words == "2 batch sizes reached the target; the hyperbola needs 3"


def test_a_target_that_untrained_networks_meet_is_too_easy() -> None:
    """With mode=bt, untrained features are evaluated at step 0."""
    found = reached({batch: [0.0] for batch in BATCHES})
    assert found.words == "runs meet the target before their first step; the hyperbola needs a harder target"
    found = reached({batch: [hyperbola(batch)] for batch in BATCHES} | {32: [0.0]})
    assert found.batch_size is not None
    assert found.batch_size.value == pytest.approx(CRITICAL, rel=0.02)


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs whose training loss is 1 / epoch, logged every 10 steps, so that each batch size takes as many steps."""
    folder = tmp_path_factory.mktemp("runs")
    for batch in (64, 128, 256):
        write_run(folder, "dataset=digits", "optimizer=sgd", f"batch_size={batch}", accuracies=(0.2, 0.4, 0.6, 0.8))
    return folder


def test_the_command_prints_tables_or_json(runs_dir: Path) -> None:
    program = [sys.executable, "-m", "largebatch.cli", "critical", str(runs_dir), "--target", "0.3"]
    program += ["--target-metric", "train/loss"]
    result = subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=200, check=True)
    lines = result.stdout.splitlines()
    assert lines[0] == "digits · smallcnn · classification: training to a training loss of 0.3"
    assert lines[2].startswith("SGD")
    assert lines[3].split() == ["batch", "steps", "images", "error", "reached"]
    assert lines[4].split()[:3] == ["64", "35", "2,240"]  # between steps 30 and 40
    assert lines[7].startswith("More devices help at none of the batch sizes tried; the critical one is below ")


def test_json_has_the_numbers_of_the_tables(runs_dir: Path) -> None:
    ((row,),) = [one["rows"] for one in json.loads(critical(runs_dir, Target(0.3, "train/loss"), as_json=True))]
    assert [batch["steps"] for batch in row["batches"]] == [35, 35, 35]
    assert row["critical_batch"]["low"] is None
    assert row["fewest_steps"]["low"] < 35 < row["fewest_steps"]["high"]
    assert row["noise_scale"] is None


def test_wrong_targets_and_folders_are_errors(runs_dir: Path, tmp_path: Path) -> None:
    for folder, target, message in (
        (runs_dir, Target(2.0), "--target=2: not an accuracy"),
        (runs_dir, Target(0.5, "los"), "--target-metric=los: unknown metric"),
        (tmp_path, Target(), "holds no readable run"),
    ):
        with pytest.raises(UserError, match=message):
            critical(folder, target)


def test_a_growing_batch_has_no_hyperbola() -> None:
    runs = [made("sgd", batch=batch, batch_schedule={"shape": "linear", "start": 32}) for batch in BATCHES]
    (comparison,) = compare(runs)
    histories = {
        run.name: [{"step": 1, "epoch": 1.0, "examples": 9, "wall_seconds": 1.0, "test/accuracy": 0.9}] for run in runs
    }
    times = time_to_target(comparison, histories, Target(0.5))
    assert times is not None
    assert criticals(comparison, times, []) == []


def test_the_chart_s_lines_are_the_hyperbolas() -> None:
    runs: list[Run] = []
    histories: Histories = {}
    for batch in BATCHES:
        for name, factor in (("sgd", 1.0), ("adamw", 2.0)):
            run = made(name, batch=batch)
            runs.append(run)
            histories[run.name] = history(run, factor * hyperbola(batch))
    (comparison,) = compare(runs)
    times = time_to_target(comparison, histories, Target(0.5))
    assert times is not None
    found = criticals(comparison, times, [])
    chart = critical_chart(comparison, found, times.goal.text, styles([comparison]))
    assert chart is not None
    lines = [trace for trace in chart.figure.data if trace.mode == "lines"]
    assert len(lines) == 2
    assert all(len(trace.x) == len(trace.y) > 20 for trace in lines)
    by_row = {one.row.optimizer: one for one in found}
    for trace in lines:
        one = by_row[trace.legendgroup.lower()]
        assert one.steps is not None
        assert list(trace.y) == pytest.approx([one.steps.value * (1 + CRITICAL / x) for x in trace.x], rel=0.03)
    assert "AdamW 699 (" in chart.note
    assert "SGD 699 (" in chart.note
    measured = [found[0]._replace(noise=Estimate(500.0, 300.0, 900.0)), *found[1:]]
    chart = critical_chart(comparison, measured, times.goal.text, styles([comparison]))
    assert chart is not None
    (noise,) = [trace for trace in chart.figure.data if trace.line.dash == "dot" and len(trace.x) == 2]
    assert list(noise.x) == [500, 500]
    assert noise.legendgroup == "SGD"
    assert chart.note.endswith("Dotted lines: the measured gradient noise scale, SGD 500 (300 to 900).")
    assert critical_chart(comparison, [one._replace(batch_size=None, steps=None) for one in found], "", {}) is None
