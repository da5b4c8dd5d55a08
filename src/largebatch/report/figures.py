"""The charts of a comparison: accuracy, curves, steps to the target, speed and schedules."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from largebatch.report.chart import (
    Chart,
    Style,
    Switch,
    aside,
    batch_axis,
    batch_switch,
    layout,
    log_axis,
    rounded,
    safe,
    see_through,
    shown_first,
)
from largebatch.report.compare import Cell, Comparison, RowKey
from largebatch.report.curves import Curve, Histories, Reached, curve
from largebatch.report.wording import cell_counts, cell_figure, decimals, row_label

Styles = Mapping[RowKey, Style]

# Metrics by what they are called in the page, in the order in which they are offered.
METRICS = {
    "test/accuracy": "test accuracy", "val/accuracy": "validation accuracy", "train/accuracy": "training accuracy",
    "test/loss": "test loss", "val/loss": "validation loss", "train/loss": "training loss",
    "test/knn_accuracy": "test accuracy of nearest neighbours",
    "val/knn_accuracy": "validation accuracy of nearest neighbours", "probe/loss": "loss of the probe",
    "embedding/std": "deviation of embeddings", "embedding/effective_rank": "effective rank of embeddings",
}  # fmt: skip
_X = Switch(
    "x",
    "over",
    [("epochs", "epochs"), ("steps", "steps"), ("seconds", "wall time")],
    {
        "epochs": {"xaxis.title.text": "epoch"},
        "steps": {"xaxis.title.text": "optimizer step"},
        "seconds": {"xaxis.title.text": "wall time [s]"},
    },
)


def accuracy_by_batch(comparison: Comparison, style: Styles) -> Chart:
    digits = decimals(comparison)

    def point(cell: Cell) -> tuple[float, float | None, str] | None:
        if cell.mean is None:
            return None
        return 100 * cell.mean, None if cell.spread is None else 100 * cell.spread, f"{cell_figure(cell, digits)} %"

    figure = _by_batch(comparison, style, point)
    figure.update_layout(layout("batch size", "test accuracy [%]", xaxis=batch_axis(comparison.columns)))
    gone = [cell for cell in comparison.shown if cell.mean is None and cell.diverged]
    note = "Mean over seeds of the chosen setting; bars are the spread. Marks of one batch size stand a little apart."
    if gone:
        said = ", ".join(f"{row_label(cell.row)} at {cell.batch_size:,}" for cell in gone)
        note += f" Not drawn, because every run diverged: {said}."
    return Chart("Accuracy against batch size", note, figure)


def speed_by_batch(comparison: Comparison, style: Styles) -> Chart | None:
    def point(cell: Cell) -> tuple[float, float | None, str] | None:
        speeds = cell.chosen.values("images_per_second") if cell.chosen else []
        if not speeds:
            return None
        middle = statistics.median(speeds)
        return rounded(middle), None, f"{middle:,.0f} images/s"

    figure = _by_batch(comparison, style, point)
    if not figure.data:
        return None
    figure.update_layout(
        layout("batch size", "training speed [images/s]", xaxis=batch_axis(comparison.columns)),
        yaxis_rangemode="tozero",
    )
    note = "Median over seeds, evaluation and start-up left out. Runs that shared their machine slowed each other down."
    return Chart("Images per second", note, figure)


def steps_to_target(comparison: Comparison, reached: Sequence[Reached], target: str, style: Styles) -> Chart | None:
    found = {(one.cell.row, one.cell.batch_size): one for one in reached}

    def point(cell: Cell) -> tuple[float, float | None, str] | None:
        one = found.get((cell.row, cell.batch_size))
        if one is None or not one.steps or one.epochs is None or one.reached < one.runs:
            return None  # a logarithmic axis has no 0 either, where features are good before any step
        return one.steps, None, f"{one.steps:,.0f} steps, {one.epochs:.4g} epochs"

    figure = _by_batch(comparison, style, point)
    if not figure.data:
        return None
    figure.update_layout(
        layout(
            "batch size",
            "optimizer steps, logarithmic",
            xaxis=batch_axis(comparison.columns),
            yaxis=log_axis(trace.y for trace in figure.data),
        )
    )
    note = (
        "The first evaluation that reaches the target, median over seeds; lower is better. Drawn where every seed "
        "reached it: the table below has the others."
    )
    return Chart(f"Steps to {target}", note, figure)


def _by_batch(
    comparison: Comparison, style: Styles, point: Callable[[Cell], tuple[float, float | None, str] | None]
) -> go.Figure:
    """A line a row over batch sizes; ``point`` gives a cell's y, its error bar and what is said of it, or None."""
    figure = go.Figure()
    for index, row in enumerate(comparison.rows):
        cells = [comparison.cells[row, batch] for batch in comparison.columns if (row, batch) in comparison.cells]
        points = [(cell, found) for cell in cells if (found := point(cell)) is not None]
        if not points:
            continue
        bars = [found[1] for _, found in points]
        figure.add_scatter(
            x=[aside(cell.batch_size, index, len(comparison.rows)) for cell, _ in points],
            y=[rounded(found[0], 6) for _, found in points],
            error_y=None if all(bar is None for bar in bars) else {
                "type": "data", "array": [rounded(bar or 0, 3) for bar in bars], "thickness": 1.5, "width": 4,
            },
            name=safe(row_label(row)),
            hovertext=[
                safe(f"{row_label(row)}, batch {cell.batch_size:,}: {found[2]}") + f"<br>{cell_counts(cell)}"
                for cell, found in points
            ],
            hoverinfo="text",
            **_line(style[row], marks=True),
        )  # fmt: skip
    return figure


def _line(style: Style, *, marks: bool = False) -> dict[str, Any]:
    line = {"mode": "lines", "line": {"color": style.colour, "dash": style.dash, "width": 2}}
    if marks:
        line |= {"mode": "lines+markers", "marker": {"color": style.colour, "symbol": style.symbol, "size": 9}}
    return line


def training_curves(comparison: Comparison, histories: Histories, style: Styles, most_points: int) -> Chart | None:
    note = (
        "Mean over seeds of the chosen settings; the band is the spread. A setting whose every seed diverged is drawn "
        "as far as it got."
    )
    return _over_training(Words("Training curves", note, METRICS), comparison, histories, style, most_points)


def schedules(comparison: Comparison, histories: Histories, style: Styles, most_points: int) -> Chart | None:
    """The learning rate, and TVLARS's phi, over training."""
    note = (
        "As logged, every tracker.log_every steps. The rate of one optimizer says nothing beside the rate of another: "
        "LARS, TVLARS and CLARS multiply it by each layer's trust ratio, TVLARS by phi too."
    )
    names = {"optim/lr": "learning rate", "optim/phi": "phi of TVLARS"}
    return _over_training(Words("Warm-up and phi", note, names), comparison, histories, style, most_points)


class Words(NamedTuple):
    """A chart's title, what stands below it, and the metrics that it offers with what they are called."""

    title: str
    note: str
    metrics: Mapping[str, str]


def _over_training(
    words: Words, comparison: Comparison, histories: Histories, style: Styles, most_points: int
) -> Chart | None:
    """Curves of every cell, one metric and batch size at a time; None where none of the metrics was logged."""
    found = {
        (metric, cell.batch_size, cell.row): drawn
        for metric in words.metrics
        for cell in comparison.shown
        if (drawn := curve(cell, metric, histories, most_points))
    }
    if not found:
        return None
    figure = go.Figure()
    for (metric, batch, row), drawn in found.items():
        _add_curve(figure, drawn, {"metric": metric, "batch": f"{batch}"}, row, style[row], "accuracy" in metric)
    offered = [metric for metric in words.metrics if any(key[0] == metric for key in found)]
    axes = {
        metric: {
            "yaxis.title.text": words.metrics[metric] + (" [%]" if "accuracy" in metric else ""),
            "yaxis.rangemode": "tozero" if metric.startswith("optim/") else "normal",
        }
        for metric in offered
    }
    switches = [
        Switch("metric", "show", [(metric, words.metrics[metric]) for metric in offered], axes),
        _X,
        batch_switch([batch for _, batch, _ in found]),
    ]
    figure.update_layout(layout("epoch", ""))
    return Chart(words.title, words.note, shown_first(figure, switches), switches)


def _add_curve(figure: go.Figure, drawn: Curve, pick: dict[str, str], row: RowKey, style: Style, percent: bool) -> None:
    scale = 100 if percent else 1
    x = {name: [rounded(at) for at in getattr(drawn, name)] for name in ("epochs", "steps", "seconds")}
    shared = {"legendgroup": row_label(row), "x": x["epochs"]}
    if drawn.spread is not None and any(drawn.spread):
        pairs = list(zip(drawn.mean, drawn.spread, strict=True))
        edge = [mean + spread for mean, spread in pairs] + [mean - spread for mean, spread in reversed(pairs)]
        around = {name: values + values[::-1] for name, values in x.items()}
        figure.add_scatter(
            y=[rounded(scale * at) for at in edge], mode="lines", line={"width": 0}, fill="toself",
            fillcolor=see_through(style.colour, 0.15), hoverinfo="skip", showlegend=False,
            meta={"pick": pick, "x": around}, **shared | {"x": around["epochs"]},
        )  # fmt: skip
    label = safe(row_label(row))
    figure.add_scatter(
        y=[rounded(scale * at) for at in drawn.mean], name=label, hovertemplate=f"{label}: %{{y:.4g}}<extra></extra>",
        meta={"pick": pick, "x": x}, **shared, **_line(style),
    )  # fmt: skip
