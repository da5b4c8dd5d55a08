"""Time to a target, where never is infinity, and AlgoPerf's performance profiles and score."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import made, seeds, write_run
from programs import Programs

from largebatch.report.cells import RowKey
from largebatch.report.chart import styles
from largebatch.report.compare import Comparison, compare
from largebatch.report.curves import Histories, Progress
from largebatch.report.load import Run
from largebatch.report.profiles import profile, profiles, relative, score, score_table
from largebatch.report.target_figures import profile_chart, time_by_batch
from largebatch.report.targets import (
    Goal,
    Target,
    TimeToTarget,
    default_target,
    reach,
    reached_table,
    time_to_target,
)

LARS, TVLARS, LAMB = (RowKey(name, "constant") for name in ("lars", "tvlars", "lamb"))
HALF = Goal("test/accuracy", 0.5)
inf = math.inf


def logged(*values: float, metric: str = "test/accuracy", every: int = 10) -> list[dict[str, Any]]:
    return [
        {"step": every * i, "epoch": float(i), "examples": 1280 * i, "wall_seconds": 2.0 * i, metric: value}
        for i, value in enumerate(values, 1)
    ]


def histories_of(runs: list[Run], *values: tuple[float, ...], metric: str = "test/accuracy") -> Histories:
    return {run.name: logged(*of_run, metric=metric) for run, of_run in zip(runs, values, strict=True)}


def test_a_run_needs_the_training_up_to_its_first_evaluation_that_meets_the_target() -> None:
    runs = seeds("lars", 0.9, 0.9, 0.9)
    (comparison,) = compare(runs)
    histories = histories_of(runs, (0.1, 0.5, 0.9), (0.1, 0.4, 0.6), (0.7, 0.2, 0.3))
    found = reach(comparison.cells[LARS, 128], HALF, histories)
    assert [seed.steps for seed in found.seeds] == [20, 30, 10]
    assert found.median == Progress(steps=20, epochs=2.0, images=2560, seconds=4.0)
    assert default_target(comparison, "test/accuracy", histories) == 0.6  # reached by the worst seed of the only cell


@pytest.mark.parametrize(
    ("firsts", "median", "main"),
    [
        ([0, 1, 2, 3, None], 30, "30 steps"),  # the median of 10, 20, 30, 40 and never
        ([0, 1, 2, None, None], 30, "30 steps"),
        ([0, 1, None, None, None], inf, "2 of 5 seeds"),
        ([None] * 5, inf, "never"),
        ([0, 1, None, None], inf, "2 of 4 seeds"),  # halfway between 20 and never
        ([0, 1, 2, None], 25, "25 steps"),
    ],
)
def test_a_seed_that_never_reaches_the_target_counts_as_infinity(
    firsts: list[int | None], median: float, main: str
) -> None:
    runs = seeds("lars", *[0.9] * len(firsts))
    (comparison,) = compare(runs)
    values = [tuple(0.9 if i == first else 0.1 for i in range(4)) for first in firsts]
    times = time_to_target(comparison, histories_of(runs, *values), Target(0.5))
    assert times is not None
    found = times.cells[LARS, 128]
    assert found.median is not None
    assert found.median.steps == median
    ((shown, rest),) = reached_table(comparison, times)[0]
    assert shown == main
    if math.isfinite(median):
        assert rest.endswith(f"s; {found.reached} of {len(firsts)} seeds")


def test_a_diverged_seed_never_reaches_the_target_and_a_failed_run_does_not_count() -> None:
    runs = [
        *seeds("lars", 0.9, 0.9), made("lars", seed=2, state="diverged"), made("lars", seed=3, state="failed"),
        made("lars", seed=4, state="running"), *[made("tvlars", seed=seed, state="failed") for seed in (0, 1)],
        made("lamb", state="diverged"), made("lamb", seed=1, state="preempted"),
    ]  # fmt: skip
    (comparison,) = compare(runs)
    histories = {run.name: logged(0.1, 0.9) if run.state == "finished" else [] for run in runs if run.done}
    times = time_to_target(comparison, histories, Target(0.5))
    assert times is not None
    assert [seed.steps for seed in times.cells[LARS, 128].seeds] == [20, 20, inf]
    assert reached_table(comparison, times) == [
        [("20 steps", "2 epochs, 2,560 images, 4 s; 2 of 3 seeds; not counted: 1 failed, 1 running")],
        [("never", "1 seed; not counted: 1 preempted")],
        [("-", "not counted: 2 failed")],
    ]


def test_a_run_without_the_metric_does_not_count() -> None:
    runs = seeds("lars", 0.9, 0.9)
    (comparison,) = compare(runs)
    found = reach(comparison.cells[LARS, 128], HALF, histories_of(runs, (0.1, 0.9), ()))
    assert (len(found.seeds), found.left_out) == (1, ["1 without test/accuracy"])


def test_a_run_that_diverges_after_the_target_reached_it() -> None:
    runs = [made("lars", state="diverged")]
    (comparison,) = compare(runs)
    found = reach(comparison.cells[LARS, 128], HALF, histories_of(runs, (0.1, 0.6, 0.1)))
    assert found.median == Progress(20, 2.0, 2560, 4.0)


def test_a_confirmed_cell_counts_only_its_confirmation_runs() -> None:
    exploring = seeds("lars", 0.9, 0.9)
    confirming = [
        made("lars", seed=2, confirms=True), made("lars", seed=3, state="diverged", confirms=True),
        made("lars", seed=4, state="failed", confirms=True),
    ]  # fmt: skip
    (comparison,) = compare([*exploring, *confirming])
    found = reach(comparison.cells[LARS, 128], HALF, histories_of(confirming, (0.1, 0.6), (0.1,), ()))
    assert [seed.steps for seed in found.seeds] == [20, inf]
    assert found.left_out == ["1 failed"]


def test_a_loss_reaches_its_target_from_above() -> None:
    runs = seeds("lars", 0.9)
    (comparison,) = compare(runs)
    histories = histories_of(runs, (2.0, 0.8, 0.5, 0.4), metric="train/loss")
    times = time_to_target(comparison, histories, Target(0.5, "train/loss"))
    assert times is not None
    assert times.goal.text == "a training loss of 0.5"
    assert times.cells[LARS, 128].median == Progress(30, 3.0, 3840, 6.0)


def timed(dataset: str, steps: dict[tuple[str, int], tuple[float, ...]]) -> tuple[Comparison, TimeToTarget]:
    """Return a comparison whose seeds reached the target after these steps."""
    runs = [
        made(name, batch=batch, seed=seed, dataset__name=dataset)
        for (name, batch), firsts in steps.items() for seed in range(len(firsts))
    ]  # fmt: skip
    (comparison,) = compare(runs)
    histories = {
        made(name, batch=batch, seed=seed, dataset__name=dataset).name: [
            {"step": 1, "epoch": 0.1, "examples": batch, "wall_seconds": 0.5, "test/accuracy": 0.1},
            *([] if first == inf else [{"step": first, "epoch": 1.0, "examples": 9, "wall_seconds": 2 * first,
                                        "test/accuracy": 0.9}]),
        ]
        for (name, batch), firsts in steps.items() for seed, first in enumerate(firsts)
    }  # fmt: skip
    times = time_to_target(comparison, histories, Target(0.5))
    assert times is not None
    return comparison, times


def test_the_chart_leaves_out_infinite_medians_and_names_them() -> None:
    comparison, times = timed("digits", {
        ("lars", 64): (20, 40, 60), ("lars", 128): (20, inf, inf), ("tvlars", 64): (30, 30, inf),
        ("tvlars", 128): (10, 20, 30),
    })  # fmt: skip
    chart = time_by_batch(comparison, times, styles([comparison]))
    assert chart is not None
    steps = {line.name: list(line.y) for line in chart.figure.data if line.meta["pick"]["measure"] == "steps"}
    assert steps == {"LARS": [40.0], "TVLARS": [30.0, 20.0]}
    seconds = {line.name: list(line.y) for line in chart.figure.data if line.meta["pick"]["measure"] == "seconds"}
    assert seconds == {"LARS": [80.0], "TVLARS": [60.0, 40.0]}
    assert chart.note.endswith("Not drawn because the median is infinite: LARS at 128 (1 of 3 seeds).")
    assert all(axes["yaxis.type"] == "log" for axes in chart.switches[0].axes.values())


def test_ratios_are_relative_to_the_fastest_row_of_each_workload() -> None:
    found = relative([
        {LARS: 10.0, TVLARS: 20.0, LAMB: inf}, {LARS: 90.0, TVLARS: 30.0, LAMB: 30.0},
        {LARS: inf, TVLARS: inf, LAMB: inf}, {LARS: 0.0, TVLARS: 5.0, LAMB: 0.0},
    ])  # fmt: skip
    assert found == {LARS: [1, 3, inf, 1], TVLARS: [2, 1, inf, inf], LAMB: [inf, 1, inf, 1]}


def test_the_profile_is_the_fraction_of_workloads_within_each_factor() -> None:
    assert profile([1.0, 2.0, 2.0, 7.0, inf]) == [(1.0, 0.2), (2.0, 0.6), (4.0, 0.6)]
    assert profile([inf, 4.0]) == [(1.0, 0.0), (4.0, 0.5)]


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [([1.0, 1.0], 1.0), ([inf, 4.0, 9.0], 0.0), ([1.0, 2.5], 0.75), ([1.0, 2.0, inf], (1 + 2 / 3) / 3)],
)
def test_the_score_is_the_area_below_the_profile(ratios: list[float], expected: float) -> None:
    assert score(ratios) == pytest.approx(expected)
    taus = np.linspace(1, 4, 300_001)
    fractions = np.mean(np.asarray(ratios)[:, None] <= taus, axis=0)
    assert score(ratios) == pytest.approx(np.trapezoid(fractions, taus) / 3, abs=1e-4)


def test_profiles_cover_the_workloads_of_all_comparisons_and_the_rows_with_a_result_in_each() -> None:
    digits = timed("digits", {
        ("lars", 64): (10, 20, 30), ("tvlars", 64): (40, 40, 40), ("lamb", 64): (5,),
        ("lars", 128): (20, inf, inf), ("tvlars", 128): (10, 10, 10),
    })  # fmt: skip
    cifar = timed("cifar10", {("lars", 128): (30,), ("tvlars", 128): (20,), ("lamb", 128): (10,)})
    found = profiles(*zip(digits, cifar, strict=True))
    assert found is not None
    assert found.workloads == [
        "digits · smallcnn · classification, batch 64: 50 % test accuracy",
        "digits · smallcnn · classification, batch 128: 50 % test accuracy",
        "cifar10 · smallcnn · classification, batch 128: 50 % test accuracy",
    ]
    # LAMB has no run in one workload, so it isn't the fastest row of the others either.
    assert found.left_out == ["LAMB (no result in 1 of 3)"]
    assert found.ratios["steps"] == {LARS: [1.0, inf, 1.5], TVLARS: [2.0, 1.0, 1.0]}
    assert found.ratios["seconds"] == found.ratios["steps"]
    assert score_table(found) == [["TVLARS", "0.889", "0.889", "3 of 3"], ["LARS", "0.611", "0.611", "2 of 3"]]
    chart = profile_chart(found, styles([digits[0], cifar[0]]))
    line = next(line for line in chart.figure.data if line.name == "LARS")
    assert (list(line.x), list(line.y), line.line.shape) == ([1, 1.5, 4], [0.3333, 0.6667, 0.6667], "hv")


def test_one_workload_or_one_row_has_no_profile() -> None:
    one = timed("digits", {("lars", 64): (10,), ("tvlars", 64): (20,)})
    alone = timed("digits", {("lars", 64): (10,), ("lars", 128): (20,)})
    assert profiles([one[0]], [one[1]]) is None
    assert profiles([alone[0]], [alone[1]]) is None
    assert profiles([one[0], alone[0]], [one[1], None]) is None


# The command, on folders of runs.


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for optimizer, accuracies in (("lars", (0.3, 0.6, 0.9)), ("lamb", (0.2, 0.4, 0.8))):
        for batch in (64, 128):
            for lr in (1, 2, 4):
                for seed in (0, 1):
                    overrides = (f"optimizer={optimizer}", f"batch_size={batch}", f"optimizer.lr={lr}", f"seed={seed}")
                    reached = tuple(accuracy - 0.02 * lr + 0.01 * seed for accuracy in accuracies)
                    write_run(folder, "dataset=digits", *overrides, accuracies=reached)
    return folder


def report(process: Programs, *arguments: str | Path, cwd: Path) -> str:
    ended = process.call("largebatch", "report", *map(str, arguments), cwd=cwd)
    assert ended.code == 0, ended.output
    return ended.stdout


def test_markdown_has_tables_of_the_learning_rate_and_of_the_target(
    runs_dir: Path, tmp_path: Path, process: Programs
) -> None:
    lines = report(process, runs_dir, "--format", "md", "--target", "0.5", cwd=tmp_path).splitlines()
    assert "| points lost by another learning rate | batch 64 | batch 128 |" in lines
    assert "| LARS | factor 2: ≥ 2.0; factor 4: ≥ 6.0 | factor 2: ≥ 2.0; factor 4: ≥ 6.0 |" in lines
    assert "| time to 50 % test accuracy | batch 64 | batch 128 |" in lines
    reached = "20 steps; 2 epochs, 2,560 images, 4 s; 2 of 2 seeds"
    assert f"| LARS | {reached} | {reached} |" in lines
    assert "| LARS | 1.000 | 1.000 | 2 of 2 |" in lines
    assert "| LAMB | 0.833 | 0.833 | 2 of 2 |" in lines  # 30 steps against 20: (4 - 1.5) / 3
    assert "## All workloads" in lines
    without = report(process, runs_dir, "--format", "md", cwd=tmp_path)
    assert "time to" not in without
    assert "AlgoPerf" not in without


def test_the_page_has_tuning_curves_the_target_and_profiles(runs_dir: Path, tmp_path: Path, process: Programs) -> None:
    options = (runs_dir, "--target", "0.4", "--target-metric", "train/loss")
    report(process, *options, "--out", "first.html", cwd=tmp_path)
    report(process, *options, "--out", "second.html", cwd=tmp_path)
    text = (tmp_path / "first.html").read_text(encoding="utf-8")
    assert text == (tmp_path / "second.html").read_text(encoding="utf-8")
    for title in ("Tuning curves", "Time to a training loss of 0.4", "Performance profiles over 2 workloads"):
        assert f"<h4>{title}</h4>" in text
    reached = "3 epochs, 3,840 images, 6 s; 2 of 2 seeds"  # 1/3 at epoch 3
    for main, small in (("30 steps", reached), ("factor 2: ≥ 2.0", "factor 4: ≥ 6.0")):
        assert f'<td><span class="accuracy">{main}</span>\n<small>{small}</small></td>' in text
    assert re.search(r'<th scope="row">LARS</th><td>1.000</td><td>1.000</td><td>2 of 2</td>', text)
