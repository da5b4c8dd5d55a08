"""Draw heat maps of the settings tried: learning rate by batch size, and by lambda. Divergence is grey."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from largebatch.report.cells import BY_TEST, BY_VALIDATION, Cell, Setting, distinct, values
from largebatch.report.chart import Chart, batch_switch, new_figure, rounded
from largebatch.report.compare import Comparison
from largebatch.report.wording import decimals, row_label, value

Places = dict[tuple[str, str], list[Setting]]  # settings by their x and y value


def setting_maps(comparison: Comparison) -> list[Chart]:
    """Draw learning rate by batch size, for each row with several learning rates. Then draw learning rate by lambda at
    each batch size, for each row with several lambdas or several relative lambdas."""
    return [
        *_maps(comparison, "optimizer.lr", "batch_size", "batch size"),
        *_maps(comparison, "optimizer.lmbda", "optimizer.lmbda", "lambda"),
        *_maps(comparison, "optimizer.lmbda_relative", "optimizer.lmbda_relative", "relative lambda"),
    ]


def _maps(comparison: Comparison, varied: str, x: str, name: str) -> list[Chart]:
    """Draw learning rate by ``x``, for each row with several values of ``varied``."""
    charts = []
    for row in comparison.rows:
        cells = comparison.row(row)
        if len(_values(cells, varied)) < 2:
            continue
        by_validation = all(cell.chosen_by == BY_VALIDATION for cell in cells if cell.chosen)
        xs, ys = _values(cells, x), _values(cells, "optimizer.lr")
        height = 150 + 44 * max(len(ys), 2)
        figure = new_figure(name, "learning rate", xaxis=_axis(xs), yaxis=_axis(ys), height=height)
        switches = [] if x == "batch_size" else [batch_switch(cell.batch_size for cell in cells)]
        for of_map in [[cell] for cell in cells] if switches else [cells]:
            pick = {"batch": f"{of_map[0].batch_size}"} if switches else {}
            _add_map(figure, _places(of_map, x), BY_VALIDATION if by_validation else BY_TEST, comparison, pick)
        note = (
            f"{'Best validation' if by_validation else 'Test'} accuracy [%], mean over seeds. "
            "Bold: the chosen setting. ✕: diverged seeds. Grey: all seeds diverged."
        )
        if any(len(settings) > 1 for settings in _places(cells, "batch_size").values()):
            note += " If several settings share a place, the map shows the best."
        charts.append(Chart(f"{row_label(row)}: learning rate by {name}", note, figure, switches))
    return charts


def _axis(labels: Sequence[str]) -> dict[str, Any]:
    # With a range: Plotly leaves out categories of hidden traces.
    return {
        "type": "category", "categoryorder": "array", "categoryarray": labels, "showgrid": False,
        "range": [-0.5, len(labels) - 0.5],
    }  # fmt: skip


def _tried(cells: Iterable[Cell]) -> list[Setting]:
    return [setting for cell in cells for setting in cell.settings if setting.tried]


def _text(option: Any) -> str:
    return f"{option:,}" if isinstance(option, int) else value(option)


def _values(cells: Iterable[Cell], key: str) -> list[str]:
    """Return the values of ``key`` in order, as axis labels."""
    return list(dict.fromkeys(map(_text, distinct(_tried(cells), key))))


def _places(cells: Iterable[Cell], x: str) -> Places:
    """Group settings by ``x`` and learning rate."""
    found: Places = {}
    for setting in _tried(cells):
        place = _text(setting.options.get(x)), _text(setting.options["optimizer.lr"])
        found.setdefault(place, []).append(setting)
    return found


def _add_map(
    figure: go.Figure, places: Places, chosen_by: str, comparison: Comparison, pick: Mapping[str, str]
) -> None:
    """Add a heat map of the places with a finished run, and a grey one of those with diverged runs only."""
    digits = decimals(comparison)
    chosen = [id(cell.chosen) for cell in comparison.shown]
    means, texts, lost = {}, {}, {}
    for place, settings in places.items():
        best = max(settings, key=lambda setting: (bool(setting.finished), setting.score(chosen_by)))
        diverged = f"✕{len(best.diverged)}" if best.diverged else ""
        if found := values(best.runs, chosen_by):
            means[place] = rounded(100 * statistics.fmean(found))
            number = f"{100 * statistics.fmean(found):.{digits}f}"
            bold = any(id(setting) in chosen for setting in settings)
            texts[place] = f"{f'<b>{number}</b>' if bold else number} {diverged}".strip()
        elif diverged:
            lost[place] = 1
            texts[place] = diverged
    xs, ys = (list(dict.fromkeys(place[i] for place in places)) for i in (0, 1))
    # The same colours in all maps of a comparison.
    of_settings = [
        values(setting.runs, metric) for metric in (BY_VALIDATION, BY_TEST) for setting in _tried(comparison.shown)
    ]
    extent = [100 * statistics.fmean(found) for found in of_settings if found]
    coloured = {
        "colorscale": "Viridis", "colorbar": {"title": {"text": "%"}, "thickness": 12, "len": 0.9},
        "zmin": rounded(min(extent, default=0.0)), "zmax": rounded(max(extent, default=100.0)),
        "hovertemplate": "%{x}, learning rate %{y}: %{text} %<extra></extra>",
    }  # fmt: skip
    grey = {
        "colorscale": ["#bdbdbd", "#bdbdbd"], "showscale": False,
        "hovertemplate": "%{x}, learning rate %{y}: diverged<extra></extra>",
    }  # fmt: skip
    for numbers, look in ((means, coloured), (lost, grey)):
        if numbers:
            figure.add_heatmap(
                x=xs, y=ys, z=[[numbers.get((x, y)) for x in xs] for y in ys],
                text=[[texts[x, y] if (x, y) in numbers else "" for x in xs] for y in ys], texttemplate="%{text}",
                xgap=2, ygap=2, meta={"pick": pick}, **look,
            )  # fmt: skip
