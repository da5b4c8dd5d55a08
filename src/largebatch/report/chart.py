"""Parts shared by all charts of the report: a Plotly figure with switches, and the style of each optimizer."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.colors import hex_to_rgb

from largebatch.config.optimizers import OPTIMIZERS
from largebatch.report.cells import RowKey
from largebatch.report.compare import Comparison

# Okabe and Ito's colours, which colour-blind people can tell apart. Their yellow is too pale for lines on white.
_COLOURS = {
    "lars": "#0072B2", "lamb": "#009E73", "tvlars": "#D55E00", "clars": "#CC79A7", "sgd": "#000000",
    "adamw": "#E69F00", "adam": "#56B4E9",
}  # fmt: skip
_OTHERS = ("#E69F00", "#56B4E9", "#CC79A7", "#666666", "#999999", "#009E73")
_DASHES = {
    "constant": "solid", "cosine": "dot", "warmup_cosine": "dash", "warmup_poly": "dashdot", "wsd": "longdashdot",
    "step": "5px,2px",
}  # fmt: skip
_SYMBOLS = {
    "constant": "circle", "cosine": "square", "warmup_cosine": "diamond-open", "warmup_poly": "triangle-up-open",
    "wsd": "hexagon-open", "step": "triangle-down-open",
}  # fmt: skip
_MORE_SYMBOLS = ("x", "star", "cross", "pentagon", "hourglass", "bowtie")
_DECADES = 4  # a logarithmic axis over fewer decades has room for ticks between the powers of ten


class Style(NamedTuple):
    colour: str
    dash: str
    symbol: str


Styles = Mapping[RowKey, Style]


@dataclass(frozen=True)
class Switch:
    """A menu above a chart. A trace is hidden if its ``meta["pick"][key]`` is another option than the chosen one.

    The key ``x`` is special: a trace's ``meta["x"]`` has its x values for each option.

    Attributes:
        options: value and text of each option. The page first shows the first option.
        axes: for each option, changes of the layout in Plotly's dotted form.
    """

    key: str
    label: str
    options: Sequence[tuple[str, str]]
    axes: dict[str, dict[str, Any]] = field(default_factory=dict)


# A logarithmic axis shows the first steps of a long training.
SCALE = Switch("scale", "axis", [("linear", "linear"), ("log", "logarithmic")], {"log": {"xaxis.type": "log"}})


@dataclass(frozen=True)
class Chart:
    """A figure with its title, the note below it and its switches, which page.js applies."""

    title: str
    note: str
    figure: go.Figure
    switches: Sequence[Switch] = ()


def styles(comparisons: Iterable[Comparison]) -> dict[RowKey, Style]:
    """Return the style of each row, the same in all charts: colour by optimizer, dash and marker by schedule."""
    rows = sorted({row for comparison in comparisons for row in comparison.rows})
    names = sorted({row.optimizer for row in rows}, key=lambda name: (name not in OPTIMIZERS, name))
    free = [colour for colour in _OTHERS if colour not in {_COLOURS.get(name) for name in names}]
    unknown = [name for name in names if name not in _COLOURS]
    colours = _COLOURS | {name: free[i % len(free)] for i, name in enumerate(unknown)}
    found: dict[RowKey, Style] = {}
    for row in rows:
        same = sum((row.optimizer, row.schedule) == (other.optimizer, other.schedule) for other in found)
        symbol = _MORE_SYMBOLS[(same - 1) % len(_MORE_SYMBOLS)] if same else _SYMBOLS.get(row.schedule, "square-open")
        found[row] = Style(colours[row.optimizer], _DASHES.get(row.schedule, "longdash"), symbol)
    return found


def line(style: Style) -> dict[str, Any]:
    return {"mode": "lines", "line": {"color": style.colour, "dash": style.dash, "width": 2}}


def filled(style: Style) -> dict[str, Any]:
    """Return the look of a band, which is drawn as its upper edge and then, backwards, its lower edge."""
    red, green, blue = hex_to_rgb(style.colour)
    return {
        "mode": "lines", "line": {"width": 0}, "fill": "toself", "fillcolor": f"rgba({red},{green},{blue},0.15)",
        "hoverinfo": "skip", "showlegend": False,
    }  # fmt: skip


def new_figure(x: str, y: str, **more: Any) -> go.Figure:
    """Return a plain white figure with axes titled ``x`` and ``y``. ``more`` is merged into its layout, key by key."""
    axis = {
        "showline": True, "linecolor": "#888", "gridcolor": "#e3e3e3", "zeroline": False, "automargin": True,
        "ticks": "outside", "tickcolor": "#888",
    }  # fmt: skip
    base = {
        "template": "none",
        "height": 380,
        "showlegend": True,  # for a single line too
        "margin": {"l": 64, "r": 16, "t": 8, "b": 52},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#222"},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {"align": "left"},
        "xaxis": {**axis, "title": {"text": x}},
        "yaxis": {**axis, "title": {"text": y, "standoff": 8}},
    }
    return go.Figure(layout=base).update_layout(more)


def batch_axis(columns: Sequence[int]) -> dict[str, Any]:
    """Return a logarithmic axis with the batch sizes as ticks."""
    low, high = math.log10(columns[0]), math.log10(columns[-1])
    pad = max(0.05 * (high - low), 0.08)
    return {
        "type": "log",
        "tickvals": list(columns),
        "ticktext": [f"{size:,}" for size in columns],
        "range": [low - pad, high + pad],
    }


def log_axis(series: Iterable[Iterable[float | None]]) -> dict[str, Any]:
    """Return a logarithmic axis for these values. Ticks are 1, 2, 5, 10, or powers of ten over many decades."""
    values = [value for values in series for value in values if value and value > 0]
    decades = math.log10(max(values) / min(values)) if values else 0
    return {"type": "log", "tickformat": ",~g", "dtick": "D2" if decades < _DECADES else 1}


def batch_switch(sizes: Iterable[int]) -> Switch:
    """Return a menu of batch sizes, the largest first: large batches are the subject of the comparison."""
    return Switch("batch", "batch size", [(f"{size}", f"{size:,}") for size in sorted(set(sizes), reverse=True)])


def rounded(value: float, digits: int = 4) -> float:
    """Round to significant digits. A chart shows no more, and more would make the page large."""
    return float(f"{value:.{digits}g}")


def safe(text: str) -> str:
    """Escape text from run folders: Plotly draws tags in its texts."""
    return html.escape(text, quote=False)
