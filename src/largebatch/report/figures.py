"""Draw the charts of a comparison: accuracy, curves, speed and schedules."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from largebatch.report.cells import Cell, RowKey, values
from largebatch.report.chart import (
    SCALE,
    Chart,
    Style,
    Styles,
    Switch,
    batch_axis,
    batch_switch,
    filled,
    line,
    log_axis,
    new_figure,
    rounded,
    safe,
)
from largebatch.report.compare import Comparison
from largebatch.report.curves import METRICS, NOISE, SHARPNESS, Curve, Histories, curve
from largebatch.report.wording import cell_accuracy, cell_counts, decimals, row_label

Point = tuple[float, float | None, str]  # y, half the length of its error bar, text at the pointer

_AXES = {"epochs": "epoch", "steps": "optimizer step", "seconds": "wall time [s]"}
_X = Switch("x", "over", list(_AXES.items()), {key: {"xaxis.title.text": title} for key, title in _AXES.items()})
_LOGARITHMIC = {"noise/scale", "noise/variance"}  # they change by orders of magnitude


def accuracy_by_batch(comparison: Comparison, style: Styles) -> Chart:
    digits = decimals(comparison)

    def point(cell: Cell) -> Point | None:
        if cell.mean is None:
            return None
        spread = None if cell.spread is None else 100 * cell.spread
        return 100 * cell.mean, spread, f"{cell_accuracy(cell, digits)} %"

    note = "Mean over seeds of the chosen setting. Bars show the spread. Marks of one batch size stand slightly apart."
    gone = [f"{row_label(cell.row)} at {cell.batch_size:,}" for cell in comparison.shown if cell.mean is None]
    if gone:
        note += f" Not drawn because every run diverged: {', '.join(gone)}."
    return by_batch("Accuracy against batch size", note, "test accuracy [%]", comparison, style, point)


def speed_by_batch(comparison: Comparison, style: Styles) -> Chart | None:
    def point(cell: Cell) -> Point | None:
        speeds = values(cell.reported, "images_per_second")
        if not speeds:
            return None
        middle = statistics.median(speeds)
        return rounded(middle), None, f"{middle:,.0f} images/s"

    note = "Median over seeds, without evaluation and start-up. Runs that shared a machine slowed each other down."
    chart = by_batch("Images per second", note, "training speed [images/s]", comparison, style, point)
    chart.figure.update_layout(yaxis_rangemode="tozero")
    return chart if chart.figure.data else None


def by_batch(
    title: str, note: str, y: str, comparison: Comparison, style: Styles, point: Callable[[Cell], Point | None]
) -> Chart:
    """Draw a line over batch sizes for each row, through the cells' points that aren't None."""
    figure = new_figure("batch size", y, xaxis=batch_axis(comparison.columns))
    for index, row in enumerate(comparison.rows):
        aside = 2 ** (0.05 * (index - (len(comparison.rows) - 1) / 2))  # keeps marks from hiding each other
        points = [(cell, found) for cell in comparison.row(row) if (found := point(cell)) is not None]
        if not points:
            continue
        bars = [found[1] for _, found in points]
        figure.add_scatter(
            x=[rounded(cell.batch_size * aside) for cell, _ in points],
            y=[rounded(found[0], 6) for _, found in points],
            error_y=None if all(bar is None for bar in bars) else {
                "type": "data", "array": [rounded(bar or 0, 3) for bar in bars], "thickness": 1.5, "width": 4,
            },
            name=safe(row_label(row)),
            hovertext=[
                f"{safe(f'{row_label(row)}, batch {cell.batch_size:,}: {found[2]}')}<br>{cell_counts(cell, comparison)}"
                for cell, found in points
            ],
            hoverinfo="text",
            marker={"color": style[row].colour, "symbol": style[row].symbol, "size": 9},
            **line(style[row]) | {"mode": "lines+markers"},
        )  # fmt: skip
    return Chart(title, note, figure)


def training_curves(comparison: Comparison, histories: Histories, style: Styles, most_points: int) -> Chart | None:
    note = (
        "Mean over seeds of the chosen settings. The band is the spread. If every seed of a setting diverged, "
        "its curve ends at the divergence."
    )
    return _over_training("Training curves", note, METRICS, comparison, histories, style, most_points)


def sharpness(comparison: Comparison, histories: Histories, style: Styles, most_points: int) -> Chart | None:
    """Draw the sharpness over training, of runs with ``instruments.sharpness_every``."""
    note = (
        "Of the training loss over fixed training images. It shows where training stands, and is no verdict: sharpness "
        "doesn't predict which method generalises better (arXiv 2302.07011). Preconditioned eigenvalues count in the "
        "optimizer's own steps; compare each with its own limit of stability over the learning rate."
    )
    return _over_training("Sharpness", note, SHARPNESS, comparison, histories, style, most_points)


def noise(comparison: Comparison, histories: Histories, style: Styles, most_points: int) -> Chart | None:
    """Draw the gradient noise scale over training, of runs with ``instruments.noise_scale``."""
    note = (
        "Means over seeds of the chosen settings. Bands are means of the runs' 90 % intervals. Far below the noise "
        "scale, a larger batch saves steps; far above it, it saves little. At weights that hardly move, the cosine of "
        "successive gradients is about 1 / (1 + noise scale / batch size). A smaller cosine: steps overshoot. "
        "The variance is the sum over all weights."
    )
    return _over_training("Gradient noise scale", note, NOISE, comparison, histories, style, most_points)


def schedules(comparison: Comparison, histories: Histories, style: Styles, most_points: int) -> Chart | None:
    """Draw the learning rate and TVLARS's phi over training."""
    note = (
        "As logged after each of the first steps, then every tracker.log_every steps. A logarithmic axis shows a short "
        "warm-up. Learning rates of different optimizers can't be compared: LARS, TVLARS and CLARS multiply theirs by "
        "each layer's trust ratio, TVLARS by phi too. The axis of learning rates is logarithmic and ends at a "
        "thousandth of the lowest peak; double-click to see everything."
    )
    names = {"optim/lr": "learning rate", "optim/phi": "phi of TVLARS"}
    return _over_training("Warm-up and phi", note, names, comparison, histories, style, most_points)


def _over_training(
    title: str, note: str, names: Mapping[str, str], comparison: Comparison, histories: Histories, style: Styles,
    most_points: int,
) -> Chart | None:  # fmt: skip
    """Draw the curves of every cell, for one metric and batch size at a time. None if no run logged such a metric."""
    found = {
        (metric, cell.batch_size, cell.row): drawn
        for metric in names
        for cell in comparison.shown
        if (drawn := curve(cell, metric, histories, most_points))
    }
    if not found:
        return None
    figure = new_figure("epoch", "")
    for (metric, batch, row), drawn in found.items():
        _add_curve(figure, drawn, {"metric": metric, "batch": f"{batch}"}, row, style[row])
    offered = list(dict.fromkeys(metric for metric, _, _ in found))
    axes = {
        metric: {
            "yaxis.title.text": names[metric] + (" [%]" if "accuracy" in metric else ""),
            "yaxis.rangemode": "tozero" if metric.startswith("optim/") else "normal",
        }
        for metric in offered
    }
    if "optim/lr" in axes:
        peaks = [max(drawn.mean) for (metric, _, _), drawn in found.items() if metric == "optim/lr"]
        axes["optim/lr"] = {"yaxis.title.text": names["optim/lr"]} | _lr_axis(peaks)
    for name in _LOGARITHMIC & axes.keys():
        axis = log_axis(drawn.mean for (metric, _, _), drawn in found.items() if metric == name)
        axes[name] |= {f"yaxis.{key}": value for key, value in axis.items()}
    show = Switch("metric", "show", [(metric, names[metric]) for metric in offered], axes)
    return Chart(title, note, figure, [show, _X, SCALE, batch_switch(batch for _, batch, _ in found)])


def _lr_axis(peaks: Sequence[float]) -> dict[str, Any]:
    """Return a logarithmic y axis for learning rates with these peaks, in Plotly's dotted form.

    Learning rates of optimizers differ by factors of a thousand. Those of a warm-up or of a cosine begin or end near 0.
    """
    peaks = [peak for peak in peaks if peak > 0]
    if not peaks:
        return {}
    limits = min(peaks) / 1000, 1.5 * max(peaks)
    axis = log_axis([limits]) | {"range": [rounded(math.log10(limit)) for limit in limits]}
    return {f"yaxis.{key}": value for key, value in axis.items()}


def _add_curve(figure: go.Figure, drawn: Curve, pick: dict[str, str], row: RowKey, style: Style) -> None:
    scale = 100 if "accuracy" in pick["metric"] else 1
    least = 0.0 if pick["metric"] in _LOGARITHMIC else -math.inf
    x = {name: [rounded(getattr(at, name)) for at in drawn.at] for name in _AXES}
    band = [(i, limits) for i, limits in enumerate(drawn.limits or []) if limits and limits[0] > least]
    if band:
        places = [i for i, _ in band]
        edge = [high for _, (_, high) in band] + [low for _, (low, _) in reversed(band)]
        around = {name: [values[i] for i in places + places[::-1]] for name, values in x.items()}
        figure.add_scatter(
            x=around["epochs"], y=[rounded(scale * at) for at in edge], meta={"pick": pick, "x": around},
            legendgroup=row_label(row), **filled(style),
        )  # fmt: skip
    label = safe(row_label(row))
    look = line(style) | ({} if len(drawn.at) > 1 else {"mode": "markers", "marker": {"color": style.colour}})
    figure.add_scatter(
        x=x["epochs"], y=[rounded(scale * at) for at in drawn.mean], meta={"pick": pick, "x": x},
        legendgroup=row_label(row), name=label, hovertemplate=f"{label}: %{{y:.4g}}<extra></extra>", **look,
    )  # fmt: skip
