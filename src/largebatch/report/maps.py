"""Heat maps of what was tried: learning rate by batch size, and lambda by learning rate; divergence in grey."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from largebatch.report.chart import Chart, batch_switch, layout, rounded, shown_first
from largebatch.report.compare import BY_TEST, BY_VALIDATION, Cell, Comparison, Setting, value_order
from largebatch.report.wording import decimals, row_label, value

_DIVERGED = "#bdbdbd"  # the grey of a place where training broke down


def rate_maps(comparison: Comparison) -> list[Chart]:
    """For each row that was tried with several learning rates, a map of rate by batch size."""
    charts = []
    for row in comparison.rows:
        cells = [comparison.cells[row, batch] for batch in comparison.columns if (row, batch) in comparison.cells]
        places = {
            (f"{cell.batch_size:,}", value(rate)): settings
            for cell in cells
            for rate, settings in _by_option(cell, "optimizer.lr").items()
        }
        rates = _order(cells, "optimizer.lr")
        if len(rates) < 2:
            continue
        figure = go.Figure()
        _add_map(figure, places, _chosen_by(cells), comparison, {})
        figure.update_layout(_map_layout("batch size", "learning rate", [f"{c.batch_size:,}" for c in cells], rates))
        charts.append(Chart(f"{row_label(row)}: learning rate by batch size", _map_note(cells), figure))
    return charts


def lambda_maps(comparison: Comparison) -> list[Chart]:
    """For each row that was tried with several lambdas, a map of lambda by learning rate, at each batch size."""
    charts = []
    for row in comparison.rows:
        cells = [comparison.cells[row, batch] for batch in comparison.columns if (row, batch) in comparison.cells]
        lambdas = _order(cells, "optimizer.lmbda")
        if len(lambdas) < 2:
            continue
        figure = go.Figure()
        for cell in cells:
            places = {
                (value(lmbda), value(rate)): of_both
                for lmbda, of_lambda in _by_option(cell, "optimizer.lmbda").items()
                for rate, of_both in _by_option(cell, "optimizer.lr", of_lambda).items()
            }
            _add_map(figure, places, _chosen_by(cells), comparison, {"batch": f"{cell.batch_size}"})
        figure.update_layout(_map_layout("lambda", "learning rate", lambdas, _order(cells, "optimizer.lr")))
        switches = [batch_switch([cell.batch_size for cell in cells])]
        title = f"{row_label(row)}: learning rate by lambda"
        charts.append(Chart(title, _map_note(cells), shown_first(figure, switches), switches))
    return charts


def _by_option(cell: Cell, key: str, settings: Sequence[Setting] | None = None) -> dict[Any, list[Setting]]:
    found: dict[Any, list[Setting]] = {}
    for setting in cell.settings if settings is None else settings:
        if setting.tried:
            found.setdefault(setting.options.get(key), []).append(setting)
    return found


def _order(cells: Sequence[Cell], key: str) -> list[str]:
    return [value(one) for one in sorted({found for cell in cells for found in _by_option(cell, key)}, key=value_order)]


def _chosen_by(cells: Sequence[Cell]) -> str:
    """What a map shows: validation accuracy where all its cells have it."""
    return next((cell.chosen_by for cell in cells if cell.chosen_by != BY_VALIDATION and cell.chosen), BY_VALIDATION)


def _map_note(cells: Sequence[Cell]) -> str:
    which = "Best validation accuracy" if _chosen_by(cells) == BY_VALIDATION else "Test accuracy"
    several = any(len(group) > 1 for cell in cells for group in _by_option(cell, "optimizer.lr").values())
    rest = " Where more than these two were varied, the best is shown." if several else ""
    return f"{which} [%], mean over seeds; bold: chosen. Grey: training broke down (✕: seeds that diverged).{rest}"


def _add_map(
    figure: go.Figure,
    places: Mapping[tuple[str, str], Sequence[Setting]],
    chosen_by: str,
    comparison: Comparison,
    pick: dict[str, str],
) -> None:
    """A heat map of the places where something finished, and one in grey of those where nothing did."""
    low, high = _extent(comparison)
    xs, ys = (list(dict.fromkeys(place[i] for place in places)) for i in (0, 1))
    best = {
        place: max(settings, key=lambda setting: (bool(setting.finished), setting.score(chosen_by)))
        for place, settings in places.items()
    }
    digits = decimals(comparison)
    means = {place: statistics.fmean(s.values(chosen_by)) for place, s in best.items() if s.values(chosen_by)}
    lost = {place: len(setting.diverged) for place, setting in best.items()}
    chosen = [cell.chosen for cell in comparison.shown if cell.chosen]
    text = {}
    for place, mean in means.items():
        said = f"{100 * mean:.{digits}f}"
        bold = any(setting is one for one in chosen for setting in places[place])
        text[place] = (f"<b>{said}</b>" if bold else said) + (f" ✕{lost[place]}" if lost[place] else "")
    gone = {place: f"✕{count}" for place, count in lost.items() if place not in means}
    shared = {"x": xs, "y": ys, "texttemplate": "%{text}", "xgap": 2, "ygap": 2, "meta": {"pick": pick}}
    if means:
        figure.add_heatmap(
            z=[[rounded(100 * means[x, y]) if (x, y) in means else None for x in xs] for y in ys],
            text=[[text.get((x, y), "") for x in xs] for y in ys],
            colorscale="Viridis", colorbar={"title": {"text": "%"}, "thickness": 12, "len": 0.9}, zmin=low, zmax=high,
            hovertemplate="%{x}, rate %{y}: %{text} %<extra></extra>", **shared,
        )  # fmt: skip
    if gone:
        figure.add_heatmap(
            z=[[1 if (x, y) in gone else None for x in xs] for y in ys],
            text=[[gone.get((x, y), "") for x in xs] for y in ys],
            colorscale=[[0, _DIVERGED], [1, _DIVERGED]], showscale=False,
            hovertemplate="%{x}, rate %{y}: diverged<extra></extra>", **shared,
        )  # fmt: skip


def _extent(comparison: Comparison) -> tuple[float, float]:
    """The colours' range, the same in all maps of a comparison, in per cent."""
    settings = [setting for cell in comparison.shown for setting in cell.settings]
    values = [v for figure in (BY_VALIDATION, BY_TEST) for s in settings if (v := s.values(figure))]
    means = [100 * statistics.fmean(of_setting) for of_setting in values]
    return rounded(min(means, default=0.0)), rounded(max(means, default=100.0))


def _map_layout(x: str, y: str, xs: Sequence[str], ys: Sequence[str]) -> dict[str, Any]:
    def axis(order: Sequence[str]) -> dict[str, Any]:
        # The range too: Plotly would leave out what only a hidden trace has.
        return {
            "type": "category", "categoryorder": "array", "categoryarray": list(order), "showgrid": False,
            "range": [-0.5, len(order) - 0.5],
        }  # fmt: skip

    height = 150 + 44 * max(len(ys), 2)
    return layout(x, y, xaxis=axis(xs), yaxis=axis(ys), height=height)
