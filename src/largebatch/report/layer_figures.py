"""The papers' diagnostic figures: weight norm, gradient norm and their ratio in every layer over training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from largebatch.report.chart import Chart, Style, Switch, batch_switch, layout, log_axis, rounded, safe, shown_first
from largebatch.report.compare import Cell, Comparison, RowKey
from largebatch.report.curves import drawn
from largebatch.report.load import Layers, Problem, read_layers, thinned
from largebatch.report.wording import row_label

Grid = list[list[float | None]]  # over layers, over steps

MOST_STEPS = 100  # of a curve
_FEWEST_STEPS = 12
# Numbers that the layers of the whole page may take: some 2.5 MB. Each is in a line, with its step, and in a map; what
# else a line needs takes as much again as some numbers.
_BUDGET, _COPIES, _OF_LINE = 400_000, 3, 60
_LEGEND = 12  # layers whose names still fit above a chart


class Diagnosed(NamedTuple):
    """The layers of one run of a cell's chosen setting: the one with the smallest seed."""

    cell: Cell
    layers: Layers


QUANTITIES: dict[str, tuple[str, Callable[[Layers], Grid]]] = {
    "lnr": ("LNR: weight norm / gradient norm", lambda layers: _ratio(layers)),
    "lwn": ("LWN: weight norm", lambda layers: layers.figures["weight_norm"]),
    "lgn": ("LGN: gradient norm", lambda layers: layers.figures["gradient_norm"]),
    "trust": ("trust ratio that the optimizer used", lambda layers: layers.figures["trust_ratio"]),
}


def _ratio(layers: Layers) -> Grid:
    return [
        [w / g if w is not None and g else None for w, g in zip(*norms, strict=True)]
        for norms in zip(layers.figures["weight_norm"], layers.figures["gradient_norm"], strict=True)
    ]


def read_diagnosed(comparison: Comparison, problems: list[Problem]) -> list[Diagnosed]:
    found = []
    for cell in comparison.shown:
        for run in drawn(cell)[:1]:
            layers = read_layers(run, MOST_STEPS, problems)
            if layers and len(layers.steps) > 1:
                found.append(Diagnosed(cell, layers))
    return found


def in_budget(diagnosed: Sequence[Diagnosed], share: float = 1.0) -> list[Diagnosed]:
    """What the charts of single layers draw: fewer steps, then batch sizes, then layers, so that the page stays small.

    Args:
        share: of the page's budget, for one comparison of several.
    """
    sizes = sorted({one.cell.batch_size for one in diagnosed})
    for few in (sizes, thinned(sizes, 3), sizes[-1:]):
        kept = [one for one in diagnosed if one.cell.batch_size in few]
        lines = sum(len(one.layers.names) for one in kept) * len(QUANTITIES)
        steps = int((_BUDGET * share / max(lines, 1) - _OF_LINE) / _COPIES)
        if steps >= _FEWEST_STEPS:
            break
    of_layer = len(kept) * len(QUANTITIES) * (_FEWEST_STEPS * _COPIES + _OF_LINE)
    most_layers = max(int(_BUDGET * share / max(of_layer, 1)), 2)
    return [Diagnosed(one.cell, _thinned(one.layers, max(steps, _FEWEST_STEPS), most_layers)) for one in kept]


def _thinned(layers: Layers, most_steps: int, most_layers: int) -> Layers:
    places = thinned(list(range(len(layers.steps))), most_steps)
    rows = thinned(list(range(len(layers.names))), most_layers)
    figures = {name: [[grid[row][i] for i in places] for row in rows] for name, grid in layers.figures.items()}
    return Layers([layers.steps[i] for i in places], [layers.names[row] for row in rows], figures)


def middle_layer(diagnosed: Sequence[Diagnosed], style: Mapping[RowKey, Style]) -> Chart:
    """The median over layers, a line an optimizer."""
    figure = go.Figure()
    for cell, layers in diagnosed:
        label = safe(row_label(cell.row))
        for quantity, (_, grid_of) in QUANTITIES.items():
            columns = [[v for v in column if v is not None and v > 0] for column in zip(*grid_of(layers), strict=True)]
            points = [(step, of_step) for step, of_step in zip(layers.steps, columns, strict=True) if of_step]
            figure.add_scatter(
                x=[step for step, _ in points], y=[rounded(statistics.median(of_step)) for _, of_step in points],
                mode="lines", name=label,
                line={"color": style[cell.row].colour, "dash": style[cell.row].dash, "width": 2},
                hovertemplate=f"{label}, step %{{x}}: %{{y:.3g}}<extra></extra>",
                meta={"pick": {"quantity": quantity, "batch": f"{cell.batch_size}"}},
            )  # fmt: skip
    switches = [_quantity_switch(figure.data), batch_switch([one.cell.batch_size for one in diagnosed])]
    figure.update_layout(layout("optimizer step", "", yaxis=log_axis([])))
    note = (
        "The median over layers; one run, the one with the smallest seed. LARS and its kin turn this ratio into each "
        "layer's rate: where it is high at the start, warm-up or phi holds it back."
    )
    return Chart("Layers, by optimizer", note, shown_first(figure, switches), switches)


def layer_lines(diagnosed: Sequence[Diagnosed]) -> Chart:
    figure = go.Figure()
    for cell, layers in diagnosed:
        colours = sample_colorscale(
            "Viridis", [0.9 * i / max(len(layers.names) - 1, 1) for i in range(len(layers.names))]
        )
        for quantity, (_, grid_of) in QUANTITIES.items():
            for name, colour, values in zip(layers.names, colours, grid_of(layers), strict=True):
                figure.add_scatter(
                    x=layers.steps, y=[rounded(v, 3) if v else None for v in values], mode="lines", name=safe(name),
                    line={"color": colour, "width": 1.5}, showlegend=len(layers.names) <= _LEGEND,
                    hovertemplate=f"{safe(name)}, step %{{x}}: %{{y:.3g}}<extra></extra>",
                    meta={"pick": _pick(cell, quantity)},
                )  # fmt: skip
    switches = [
        _quantity_switch(figure.data),
        _row_switch(diagnosed),
        batch_switch([one.cell.batch_size for one in diagnosed]),
    ]
    figure.update_layout(layout("optimizer step", "", yaxis=log_axis([])))
    note = "A line a layer, from dark (the first) to light (the last); a layer's name is at the pointer."
    return Chart("Every layer, as lines", note, shown_first(figure, switches), switches)


def layer_map(diagnosed: Sequence[Diagnosed]) -> Chart:
    figure = go.Figure()
    for cell, layers in diagnosed:
        for quantity, (_, grid_of) in QUANTITIES.items():
            logs = [[rounded(math.log10(v), 3) if v and v > 0 else None for v in row] for row in grid_of(layers)]
            figure.add_heatmap(
                x=layers.steps, y=[safe(name) for name in layers.names], z=logs, colorscale="Viridis",
                colorbar={"title": {"text": "log₁₀"}, "thickness": 12, "len": 0.9},
                hovertemplate="%{y}, step %{x}: 10^%{z:.2f}<extra></extra>", meta={"pick": _pick(cell, quantity)},
            )  # fmt: skip
    switches = [
        _quantity_switch(),
        _row_switch(diagnosed),
        batch_switch([one.cell.batch_size for one in diagnosed]),
    ]
    most = max(len(one.layers.names) for one in diagnosed)
    yaxis = {"autorange": "reversed", "type": "category", "showgrid": False, "tickfont": {"size": 10}}
    figure.update_layout(layout("optimizer step", "layer", yaxis=yaxis, height=min(max(200 + 14 * most, 300), 900)))
    note = "The first layer is on top. Colours are powers of ten: 2 is 100, -1 is 0.1."
    return Chart("Every layer, as a map", note, shown_first(figure, switches), switches)


def _pick(cell: Cell, quantity: str) -> dict[str, str]:
    return {"quantity": quantity, "row": row_label(cell.row), "batch": f"{cell.batch_size}"}


def _quantity_switch(lines: Sequence[Any] = ()) -> Switch:
    """``lines``: traces over a logarithmic axis, which is titled and ticked by the quantity."""
    axes = {}
    for key, (words, _) in QUANTITIES.items() if lines else ():
        of_key = [line.y for line in lines if line.meta["pick"]["quantity"] == key]
        title = words.partition(":")[2].strip() or words
        axes[key] = {"yaxis.title.text": title, "yaxis.dtick": log_axis(of_key)["dtick"]}
    return Switch("quantity", "show", [(key, words) for key, (words, _) in QUANTITIES.items()], axes)


def _row_switch(diagnosed: Sequence[Diagnosed]) -> Switch:
    labels = dict.fromkeys(row_label(one.cell.row) for one in diagnosed)
    return Switch("row", "optimizer", [(label, label) for label in labels])
