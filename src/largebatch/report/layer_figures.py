"""Draw the papers' diagnostics: weight norm, gradient norm and their ratio in every layer over training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from plotly.colors import sample_colorscale

from largebatch.report.cells import Cell
from largebatch.report.chart import (
    SCALE,
    Chart,
    Styles,
    Switch,
    batch_switch,
    line,
    log_axis,
    new_figure,
    rounded,
    safe,
)
from largebatch.report.compare import Comparison
from largebatch.report.load import Layers, Problem, read_layers, thinned
from largebatch.report.wording import row_label

Grid = list[list[float | None]]  # [layers, steps]

MOST_STEPS = 100  # of a curve
_FEWEST_STEPS = 12
# Numbers for the layer charts of the whole page, about 2.5 MB. A value stands in a line, with its step, and in a map:
# _COPIES numbers. The rest of a line takes as much space as _OF_LINE numbers.
_BUDGET, _COPIES, _OF_LINE = 400_000, 3, 60
_LEGEND = 12  # most layers whose names fit above a chart
_KINDS = {"weights": "weights", "vectors": "biases and norm scales"}


class Diagnosed(NamedTuple):
    """Layers of one kind, of one run of a cell's chosen setting: the run with the smallest seed."""

    cell: Cell
    layers: Layers

    @property
    def kind(self) -> str:
        return _kind(self.layers.dimensions[0])


def _kind(dimensions: int) -> str:
    return "weights" if dimensions > 1 else "vectors"


def _ratio(layers: Layers) -> Grid:
    return [
        [w / g if w is not None and g else None for w, g in zip(*norms, strict=True)]
        for norms in zip(layers.columns["weight_norm"], layers.columns["gradient_norm"], strict=True)
    ]


QUANTITIES: dict[str, tuple[str, Callable[[Layers], Grid]]] = {
    "lnr": ("LNR: weight norm / gradient norm", _ratio),
    "lwn": ("LWN: weight norm", lambda layers: layers.columns["weight_norm"]),
    "lgn": ("LGN: gradient norm", lambda layers: layers.columns["gradient_norm"]),
    "trust": ("trust ratio used by the optimizer", lambda layers: layers.columns["trust_ratio"]),
    "update": ("update ratio: norm of the step / weight norm", lambda layers: layers.columns["update_ratio"]),
}


def read_diagnosed(comparison: Comparison, problems: list[Problem]) -> list[Diagnosed]:
    found = []
    for cell in comparison.shown:
        for run in cell.drawn[:1]:
            layers = read_layers(run, MOST_STEPS, problems)
            if not layers or len(layers.steps) < 2:
                continue
            for kind in _KINDS:
                rows = [i for i, dimensions in enumerate(layers.dimensions) if _kind(dimensions) == kind]
                if rows:
                    found.append(Diagnosed(cell, _part(layers, range(len(layers.steps)), rows)))
    return found


def in_budget(diagnosed: Sequence[Diagnosed], share: float = 1.0) -> list[Diagnosed]:
    """Keep the page small: take fewer steps, then fewer batch sizes, then fewer layers.

    Args:
        share: part of the page's budget, for one of several comparisons.
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
    places = thinned(list(range(len(layers.steps))), most_steps, power=2)
    return _part(layers, places, thinned(list(range(len(layers.names))), most_layers))


def _part(layers: Layers, places: Sequence[int], rows: Sequence[int]) -> Layers:
    """Return the layers of these rows, at the steps of these places."""
    columns = {name: [[grid[row][i] for i in places] for row in rows] for name, grid in layers.columns.items()}
    names, dimensions = [layers.names[row] for row in rows], [layers.dimensions[row] for row in rows]
    return Layers([layers.steps[i] for i in places], names, dimensions, columns)


def layer_charts(diagnosed: Sequence[Diagnosed], share: float, style: Styles) -> list[Chart]:
    if not diagnosed:
        return []
    few = in_budget([one for one in diagnosed if one.kind == "weights"], share)
    return [middle_layer(diagnosed, style), *([layer_lines(few), layer_map(few)] if few else [])]


def middle_layer(diagnosed: Sequence[Diagnosed], style: Styles) -> Chart:
    """Draw the median over layers, a line for each optimizer."""
    figure = new_figure("optimizer step", "", yaxis=log_axis([]))
    for one, pick, grid in _grids(diagnosed):
        cell, layers = one
        label = safe(row_label(cell.row))
        columns = [[v for v in column if v is not None and v > 0] for column in zip(*grid, strict=True)]
        points = [(step, of_step) for step, of_step in zip(layers.steps, columns, strict=True) if of_step]
        figure.add_scatter(
            x=[step for step, _ in points], y=[rounded(statistics.median(of_step)) for _, of_step in points],
            name=label, hovertemplate=f"{label}, step %{{x}}: %{{y:.3g}}<extra></extra>",
            meta={"pick": {"kind": one.kind, "quantity": pick["quantity"], "batch": pick["batch"]}},
            **line(style[cell.row]),
        )  # fmt: skip
    note = (
        "Median over the layers of one run, the run with the smallest seed. LARS, TVLARS and CLARS multiply each "
        "layer's learning rate by a ratio like LNR. If it is high at the start, warm-up or phi makes the step smaller. "
        "Biases and norm scales have the trust ratio 1 unless the optimizer scales them."
    )
    quantity, _, batch, scale = _switches(diagnosed, figure.data)
    found = {one.kind for one in diagnosed}
    kinds = Switch("kind", "of", [(kind, words) for kind, words in _KINDS.items() if kind in found])
    return Chart("Layers, by optimizer", note, figure, [quantity, kinds, batch, scale])


def layer_lines(diagnosed: Sequence[Diagnosed]) -> Chart:
    figure = new_figure("optimizer step", "", yaxis=log_axis([]))
    for (_, layers), pick, grid in _grids(diagnosed):
        last = max(len(layers.names) - 1, 1)
        colours = sample_colorscale("Viridis", [0.9 * i / last for i in range(len(layers.names))])
        for name, colour, values in zip(layers.names, colours, grid, strict=True):
            figure.add_scatter(
                x=layers.steps, y=[rounded(v, 3) if v else None for v in values], mode="lines", name=safe(name),
                line={"color": colour, "width": 1.5}, showlegend=len(layers.names) <= _LEGEND,
                hovertemplate=f"{safe(name)}, step %{{x}}: %{{y:.3g}}<extra></extra>", meta={"pick": pick},
            )  # fmt: skip
    note = (
        "A line for each weight tensor, from dark (first layer) to light (last layer). "
        "Point at a line for its layer's name."
    )
    return Chart("Every layer, as lines", note, figure, _switches(diagnosed, figure.data))


def layer_map(diagnosed: Sequence[Diagnosed]) -> Chart:
    most = max(len(one.layers.names) for one in diagnosed)
    yaxis = {"autorange": "reversed", "type": "category", "showgrid": False, "tickfont": {"size": 10}}
    figure = new_figure("optimizer step", "layer", yaxis=yaxis, height=min(max(200 + 14 * most, 300), 900))
    for (_, layers), pick, grid in _grids(diagnosed):
        figure.add_heatmap(
            x=layers.steps, y=[safe(name) for name in layers.names],
            z=[[rounded(math.log10(v), 3) if v and v > 0 else None for v in row] for row in grid], colorscale="Viridis",
            colorbar={"title": {"text": "log₁₀"}, "thickness": 12, "len": 0.9},
            hovertemplate="%{y}, step %{x}: 10^%{z:.2f}<extra></extra>", meta={"pick": pick},
        )  # fmt: skip
    note = "The first layer is at the top. Colours are powers of ten: 2 means 100, -1 means 0.1."
    return Chart("Every layer, as a map", note, figure, _switches(diagnosed))


def _grids(diagnosed: Sequence[Diagnosed]) -> Iterator[tuple[Diagnosed, dict[str, str], Grid]]:
    """Yield each quantity of each run, with the options that show it."""
    for one in diagnosed:
        for quantity, (_, grid_of) in QUANTITIES.items():
            pick = {"quantity": quantity, "row": row_label(one.cell.row), "batch": f"{one.cell.batch_size}"}
            yield one, pick, grid_of(one.layers)


def _switches(diagnosed: Sequence[Diagnosed], lines: Sequence[Any] = ()) -> list[Switch]:
    """Return the menus of quantity, optimizer, batch size and the scale of the axis.

    Args:
        lines: traces over a logarithmic axis, whose title and ticks follow the quantity.
    """
    axes = {}
    for key, (words, _) in QUANTITIES.items() if lines else ():
        of_key = [trace.y for trace in lines if trace.meta["pick"]["quantity"] == key]
        title = words.partition(":")[2].strip() or words
        axes[key] = {"yaxis.title.text": title, "yaxis.dtick": log_axis(of_key)["dtick"]}
    labels = dict.fromkeys(row_label(one.cell.row) for one in diagnosed)
    return [
        Switch("quantity", "show", [(key, words) for key, (words, _) in QUANTITIES.items()], axes),
        Switch("row", "optimizer", [(label, label) for label in labels]),
        batch_switch(one.cell.batch_size for one in diagnosed),
        SCALE,
    ]
