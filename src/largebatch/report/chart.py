"""What all charts of the report share: a Plotly figure with switches beside it, and how each optimizer is drawn."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

from largebatch.report.compare import OPTIMIZERS, Comparison, RowKey

# Okabe and Ito's colours, which colour-blind people can tell apart; without their yellow, too pale for lines on white.
_COLOURS = {
    "lars": "#0072B2", "lamb": "#009E73", "tvlars": "#D55E00", "clars": "#CC79A7", "sgd": "#000000",
    "adamw": "#E69F00", "adam": "#56B4E9",
}  # fmt: skip
_OTHERS = ("#E69F00", "#56B4E9", "#CC79A7", "#666666", "#999999", "#009E73")
_DASHES = {"constant": "solid", "cosine": "dot", "warmup_cosine": "dash", "warmup_poly": "dashdot"}
_SYMBOLS = {
    "constant": "circle",
    "cosine": "square",
    "warmup_cosine": "diamond-open",
    "warmup_poly": "triangle-up-open",
}
_DECADES = 4  # of a logarithmic axis that still has room for ticks between the powers of ten
_MORE_SYMBOLS = ("x", "star", "cross", "pentagon", "hourglass", "bowtie")


@dataclass(frozen=True)
class Style:
    colour: str
    dash: str
    symbol: str


@dataclass(frozen=True)
class Switch:
    """A choice above a chart: traces whose ``meta["pick"]`` names another option for ``key`` are hidden.

    The key ``x`` is special: a trace's ``meta["x"]`` has its x values for each option.
    ``axes`` are changes of the layout by option, in Plotly's dotted form.
    """

    key: str
    label: str
    options: Sequence[tuple[str, str]]  # value and what is read; the first is shown first
    axes: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Chart:
    title: str
    note: str
    figure: go.Figure
    switches: Sequence[Switch] = ()


def styles(comparisons: Iterable[Comparison]) -> dict[RowKey, Style]:
    """How each row is drawn, the same in all charts: colour by optimizer, line and marker by schedule."""
    rows = sorted({row for comparison in comparisons for row in comparison.rows})
    unknown = sorted({row.optimizer for row in rows if row.optimizer not in _COLOURS})
    unknown.sort(key=lambda name: name not in OPTIMIZERS)
    known = {row.optimizer for row in rows}
    free = [colour for colour in _OTHERS if all(_COLOURS[name] != colour for name in known if name in _COLOURS)]
    colours = _COLOURS | {name: free[i % len(free)] for i, name in enumerate(unknown)}
    found: dict[RowKey, Style] = {}
    for row in rows:
        symbol, nth = _SYMBOLS.get(row.schedule, "square-open"), sum(_kin(row, other) for other in found)
        if nth:
            symbol = _MORE_SYMBOLS[(nth - 1) % len(_MORE_SYMBOLS)]
        found[row] = Style(colours[row.optimizer], _DASHES.get(row.schedule, "longdash"), symbol)
    return found


def _kin(row: RowKey, other: RowKey) -> bool:
    return (row.optimizer, row.schedule) == (other.optimizer, other.schedule)


def layout(x: str, y: str, **more: Any) -> dict[str, Any]:
    """A plain white layout with labelled axes; ``more`` is merged into it, dictionaries key by key."""
    axis = {
        "showline": True, "linecolor": "#888", "gridcolor": "#e3e3e3", "zeroline": False, "automargin": True,
        "ticks": "outside", "tickcolor": "#888",
    }  # fmt: skip
    base: dict[str, Any] = {
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
    for key, value in more.items():
        base[key] = {**base[key], **value} if isinstance(value, dict) and key in base else value
    return base


def batch_axis(columns: Sequence[int]) -> dict[str, Any]:
    """A logarithmic axis with the batch sizes that were run as its ticks."""
    low, high = math.log10(columns[0]), math.log10(columns[-1])
    pad = max(0.05 * (high - low), 0.08)
    return {
        "type": "log",
        "tickvals": list(columns),
        "ticktext": [f"{size:,}" for size in columns],
        "range": [low - pad, high + pad],
    }


def log_axis(series: Iterable[Iterable[float | None]]) -> dict[str, Any]:
    """A logarithmic axis for these values, with ticks at 1, 2, 5, 10, or at powers of ten where there are many."""
    values = [value for one in series for value in one if value and value > 0]
    decades = math.log10(max(values) / min(values)) if values else 0
    return {"type": "log", "tickformat": ",~g", "dtick": "D2" if decades < _DECADES else 1}


def batch_switch(sizes: Sequence[int]) -> Switch:
    """The largest first: large batches are what the comparison is about."""
    return Switch("batch", "batch size", [(f"{size}", f"{size:,}") for size in sorted(set(sizes), reverse=True)])


def aside(batch: int, index: int, count: int) -> float:
    """``batch``, a little to the side, so that marks of several rows at one batch don't hide each other."""
    return rounded(batch * 2 ** (0.05 * (index - (count - 1) / 2)))


def shown_first(figure: go.Figure, switches: Sequence[Switch]) -> go.Figure:
    """``figure`` with all but the switches' first options hidden."""
    first = {switch.key: switch.options[0][0] for switch in switches}
    for trace in figure.data:
        pick = (trace.meta or {}).get("pick", {})
        trace.visible = all(first[key] == value for key, value in pick.items())
    for switch in switches:
        for key, value in switch.axes.get(first[switch.key], {}).items():
            figure.update_layout({key.replace(".", "_"): value})
    return figure


def rounded(value: float, digits: int = 4) -> float:
    """To significant digits: more can't be seen, and would make the page large."""
    return float(f"{value:.{digits}g}")


def safe(text: str) -> str:
    """Text from run folders, for Plotly, which reads tags in what it draws."""
    return html.escape(text, quote=False)


def see_through(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
