"""Data of the charts: places in maps, colours, switches, and limits on their size."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from made_runs import made, seeds

from largebatch.report.chart import styles
from largebatch.report.compare import compare
from largebatch.report.figures import accuracy_by_batch, noise, schedules, sharpness, training_curves
from largebatch.report.layer_figures import Diagnosed, in_budget, layer_charts, layer_lines, layer_map, middle_layer
from largebatch.report.load import Layers
from largebatch.report.maps import setting_maps
from largebatch.tracking.rows import COLUMNS


def at(trace: Any, x: str, y: str, what: str = "z") -> Any:
    return trace[what][list(trace.y).index(y)][list(trace.x).index(x)]


def test_a_learning_rate_map_shows_mean_validation_accuracy_and_grey_divergence() -> None:
    runs = [
        *[made(lr=2.0, seed=seed, val=val) for seed, val in enumerate((0.80, 0.90))],
        *[made(lr=10.0, seed=seed, val=0.1, state="diverged") for seed in (0, 1)],
        *[made(lr=2.0, batch=1024, seed=seed, val=0.6) for seed in (0, 1)],
        made(lr=10.0, batch=1024, seed=0, val=0.7), made(lr=10.0, batch=1024, seed=1, val=0.7, state="diverged"),
    ]  # fmt: skip
    runs.append(made(lr=50.0, state="running"))  # no outcome, so not in the map
    (chart,) = setting_maps(compare(runs)[0])
    accuracy, diverged = chart.figure.data
    assert at(accuracy, "128", "2") == 85.0
    assert at(accuracy, "1,024", "10") == 70.0
    assert at(accuracy, "1,024", "10", "text") == "70.0 ✕1"  # its score 0.7 / 2 is below 0.6
    assert at(accuracy, "1,024", "2", "text") == "<b>60.0</b>"
    assert at(accuracy, "128", "10") is None
    assert at(diverged, "128", "10", "text") == "✕2"
    assert list(chart.figure.layout.yaxis.categoryarray) == ["2", "10"]  # by size, not as text


def test_a_single_learning_rate_has_no_map() -> None:
    assert setting_maps(compare(seeds("lars", 0.5, 0.6))[0]) == []


@pytest.mark.parametrize("key", ["lmbda", "lmbda_relative"])
def test_several_lambdas_have_a_map(key: str) -> None:
    runs = [
        made("tvlars", lr=lr, batch=batch, **{f"optimizer__{key}": lmbda}, val=lr / 10 + 100 * lmbda)
        for lr in (1.0, 2.0) for lmbda in (1e-4, 1e-3) for batch in (128, 1024)
    ]  # fmt: skip
    comparison = compare([*runs, made("lars", lr=1.0, val=0.5)])[0]
    (_, chart) = setting_maps(comparison)
    assert [option for option, _ in chart.switches[0].options] == ["1024", "128"]
    assert [trace.meta["pick"] for trace in chart.figure.data] == [{"batch": "128"}, {"batch": "1024"}]
    assert at(chart.figure.data[0], "0.001", "2") == 30.0  # 2 / 10 + 100 * 0.001


def test_an_optimizer_has_one_colour_and_each_schedule_another_dash() -> None:
    runs = [made(name, schedule, model__name=model) for name in ("lars", "tvlars", "mine", "other")
            for schedule in ("constant", "warmup_cosine") for model in ("a", "b")]  # fmt: skip
    comparisons = compare(runs)
    style = styles(comparisons)
    assert len({drawn.colour for drawn in style.values()}) == 4
    for first, second in itertools.combinations(style, 2):
        same = first.optimizer == second.optimizer
        assert (style[first].colour == style[second].colour) == same
        if same:
            assert style[first].dash != style[second].dash
            assert style[first].symbol != style[second].symbol
    for comparison in comparisons:
        for trace, row in zip(accuracy_by_batch(comparison, style).figure.data, comparison.rows, strict=True):
            assert (trace.line.color, trace.line.dash) == (style[row].colour, style[row].dash)


def test_a_curve_is_the_mean_in_a_band_of_the_spread() -> None:
    runs = seeds("lars", 0.5, 0.5)
    (comparison,) = compare(runs)
    histories = {
        run.name: [
            {"step": s, "epoch": s / 10, "examples": 128 * s, "wall_seconds": float(s), "test/accuracy": a}
            for s, a in points
        ]
        for run, points in zip(runs, (((10, 0.2), (20, 0.5), (25, 0.1)), ((10, 0.4), (20, 0.5))), strict=True)
    }
    chart = training_curves(comparison, histories, styles([comparison]), 100)
    assert chart is not None
    band, line = chart.figure.data
    assert list(line.y) == [30.0, 50.0]  # only at steps that both runs logged
    assert list(band.y) == [44.14, 50.0, 50.0, 15.86]  # 0.3 ± 0.1 * sqrt(2) at the first step; the lower edge runs back
    assert line.meta["x"] == {"epochs": [1.0, 2.0], "steps": [10.0, 20.0], "seconds": [10.0, 20.0]}
    assert band.meta["x"]["steps"] == [10.0, 20.0, 20.0, 10.0]


def test_measured_sharpness_has_a_chart_of_its_own() -> None:
    (comparison,) = compare(seeds("lars", 0.5))
    rows = [
        {
            "step": s, "epoch": s / 10, "examples": 128 * s, "wall_seconds": float(s), "sharpness/eigenvalue": 90.0 - s,
            "sharpness/trace": 300.0, **({"sharpness/preconditioned": 2.5} if s else {}),
        }
        for s in (0, 10, 20)
    ]  # fmt: skip
    histories = {run.name: rows for run in comparison.runs}
    chart = sharpness(comparison, histories, styles([comparison]), 100)
    assert chart is not None
    assert [option for option, _ in chart.switches[0].options] == [
        "sharpness/eigenvalue", "sharpness/preconditioned", "sharpness/trace",
    ]  # fmt: skip
    assert [list(trace.y) for trace in chart.figure.data] == [[90, 80, 70], [2.5, 2.5], [300, 300, 300]]
    assert "no verdict" in chart.note
    assert training_curves(comparison, histories, styles([comparison]), 100) is None
    unmeasured = {run.name: [] for run in comparison.runs}
    assert sharpness(comparison, unmeasured, styles([comparison]), 100) is None


def test_the_noise_scale_has_a_chart_with_its_interval() -> None:
    """A band ends where a run has no interval, and can't reach 0 on a logarithmic axis."""
    runs = seeds("lars", 0.5, 0.5)
    (comparison,) = compare(runs)
    histories = {
        run.name: [
            {
                "step": s, "epoch": s / 10, "examples": 128 * s, "wall_seconds": float(s), "noise/scale": scale,
                "noise/scale_low": low, "noise/cosine": -0.1, "noise/cosine_low": -0.3, "noise/cosine_high": 0.1,
                **({"noise/scale_high": high} if high else {}),
            }
            for s, low, scale, high in rows
        ]
        for run, rows in zip(
            runs,
            (
                [(10, 0.0, 50.0, 90.0), (20, 40.0, 60.0, 80.0), (30, 50.0, 70.0, 95.0), (40, 60.0, 80.0, None)],
                [(10, 0.0, 50.0, 90.0), (20, 20.0, 40.0, 90.0), (30, 30.0, 50.0, 65.0), (40, 60.0, 80.0, 90.0)],
            ),
            strict=True,
        )
    }  # fmt: skip
    chart = noise(comparison, histories, styles([comparison]), 100)
    assert chart is not None
    band, line, cosine_band, cosine = chart.figure.data
    assert list(line.y) == [50, 50, 60, 80]
    assert band.meta["x"]["steps"] == [20, 30, 30, 20]
    assert list(band.y) == [85, 80, 40, 30]  # the upper edge, and the lower edge back
    assert list(cosine.y) == [-0.1] * 4
    assert list(cosine_band.y) == [0.1] * 4 + [-0.3] * 4
    assert chart.switches[0].axes["noise/scale"]["yaxis.type"] == "log"
    assert "yaxis.type" not in chart.switches[0].axes["noise/cosine"]
    assert sharpness(comparison, histories, styles([comparison]), 100) is None


def test_a_short_warm_up_is_visible_in_the_schedule_of_a_long_training() -> None:
    """Two of 100 epochs of 98 steps are warm-up. The chart has 24 points, the fewest on a page."""
    (comparison,) = compare([made("lars", "warmup_cosine")])
    warmup, steps = 196, [*range(1, 21), *range(30, 9801, 10)]
    rows = [
        {
            "step": s,
            "epoch": s / 98,
            "examples": 0,
            "wall_seconds": float(s),
            "optim/lr": min(s / warmup, 2 - s / 9800),
        }
        for s in steps
    ]
    chart = schedules(comparison, {run.name: rows for run in comparison.runs}, styles([comparison]), 24)
    assert chart is not None
    (line,) = chart.figure.data
    during = [rate for step, rate in zip(line.meta["x"]["steps"], line.y, strict=True) if step <= warmup]
    assert len(during) >= 4
    assert during == sorted(during)
    assert during[0] < 0.1 < 0.5 < during[-1]
    (scale,) = (switch for switch in chart.switches if switch.key == "scale")
    assert scale.axes["log"] == {"xaxis.type": "log"}


def test_learning_rates_have_a_logarithmic_axis_that_shows_every_optimizer() -> None:
    """One peaks at 9 and one at 0.01. Both end at 0, which a logarithmic axis can't show."""
    (comparison,) = compare([made("lars", lr=9.0), made("lamb", lr=0.01)])
    histories = {}
    for run in comparison.runs:
        rates = [run.config["optimizer"]["lr"] * (1 - s / 100) for s in range(0, 101, 10)]
        histories[run.name] = [
            {"step": 10 * i, "epoch": i, "examples": 0, "wall_seconds": i, "optim/lr": rate, "optim/phi": 0.5}
            for i, rate in enumerate(rates)
        ]
    chart = schedules(comparison, histories, styles([comparison]), 24)
    assert chart is not None
    (show,) = (switch for switch in chart.switches if switch.key == "metric")
    axis = show.axes["optim/lr"]
    assert axis["yaxis.type"] == "log"
    low, high = (10**limit for limit in axis["yaxis.range"])
    assert low == pytest.approx(1e-5, rel=0.01)
    assert 9 < high < 20
    assert "yaxis.type" not in show.axes["optim/phi"]


def test_the_losses_of_a_diverged_run_are_drawn_up_to_its_end() -> None:
    (comparison,) = compare([made("lars", state="diverged", test=None)])
    for losses in ([2.3], [2.3, 9.1, 1e8]):
        rows = [
            {"step": s, "epoch": s / 9, "examples": 0, "wall_seconds": float(s), "train/loss": loss}
            for s, loss in enumerate([*losses, None], start=1)
        ]
        chart = training_curves(comparison, {run.name: rows for run in comparison.runs}, styles([comparison]), 24)
        assert chart is not None
        (line,) = chart.figure.data
        assert list(line.y) == losses
        assert line.mode == ("markers" if len(losses) == 1 else "lines")


def layered(layers: int, steps: int, *sizes: int) -> list[Diagnosed]:
    grid: list[list[float | None]] = [[float(layer + 1)] * steps for layer in range(layers)]
    columns = dict.fromkeys(COLUMNS, grid) | {"gradient_norm": [[2.0] * steps for _ in grid]}
    found = Layers(list(range(steps)), [f"layer{i}" for i in range(layers)], [4] * layers, columns)
    cells = compare(made(batch=size) for size in sizes)[0].shown
    return [Diagnosed(cell, found) for cell in cells]


def test_lnr_is_weight_norm_over_gradient_norm() -> None:
    diagnosed = layered(3, 5, 128)
    (comparison,) = compare([made(batch=128)])
    chart = middle_layer(diagnosed, styles([comparison]))
    assert list(chart.figure.data[0].y) == [1.0] * 5  # the median of 1/2, 2/2 and 3/2
    lines = [trace for trace in layer_lines(diagnosed).figure.data if trace.meta["pick"]["quantity"] == "lnr"]
    assert [list(trace.y) for trace in lines] == [[0.5] * 5, [1.0] * 5, [1.5] * 5]
    (lnr, *_) = layer_map(diagnosed).figure.data
    assert list(lnr.y) == ["layer0", "layer1", "layer2"]
    assert lnr.z[0][0] == -0.301  # log10 of 1/2


def test_biases_have_a_median_of_their_own_and_no_lines() -> None:
    (weights,) = layered(3, 5, 128)
    biases = Diagnosed(weights.cell, weights.layers._replace(names=["a", "b", "c"], dimensions=[1, 1, 1]))
    middle, lines, as_map = layer_charts([weights, biases], 1.0, styles(compare([made(batch=128)])))
    assert [key for switch in middle.switches if switch.key == "kind" for key, _ in switch.options] == [
        "weights",
        "vectors",
    ]
    first = {switch.key: switch.options[0][0] for switch in middle.switches}
    (shown,) = (trace for trace in middle.figure.data if trace.meta["pick"].items() <= first.items())
    assert shown.meta["pick"] == {"kind": "weights", "quantity": "lnr", "batch": "128"}
    assert len(middle.figure.data) == 2 * 5
    assert {trace.name for trace in lines.figure.data} == {"layer0", "layer1", "layer2"}
    assert len(as_map.figure.data) == 5


def test_many_layers_are_drawn_at_fewer_steps_then_at_fewer_batch_sizes() -> None:
    few = in_budget(layered(5, 100, 128, 256))
    assert [len(one.layers.steps) for one in few] == [100, 100]
    sizes = (64, 128, 256, 512, 1024)
    many = in_budget(layered(200, 100, *sizes))
    assert [one.cell.batch_size for one in many] == [64, 256, 1024]
    assert 12 <= len(many[0].layers.steps) < 100
    assert (many[0].layers.steps[0], many[0].layers.steps[-1]) == (0, 99)
    most = in_budget(layered(2000, 100, *sizes))
    assert [(one.cell.batch_size, len(one.layers.steps)) for one in most] == [(1024, 12)]
    assert (most[0].layers.names[0], most[0].layers.names[-1]) == ("layer0", "layer1999")
    assert 800 < len(most[0].layers.names) < 850  # 400,000 numbers / (5 quantities * (12 * 3 + 60)) = 833
