"""Draw heat maps of the settings tried: learning rate by batch size, and by lambda. Divergence is grey."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from largebatch.report.chart import Chart, batch_switch, layout, rounded
from largebatch.report.compare import BY_TEST, BY_VALIDATION, Cell, Comparison, Setting, value_order
from largebatch.report.wording import decimals, row_label, value

_DIVERGED = "#bdbdbd"

Places = dict[tuple[str, str], list[Setting]]  # settings by their x and y value


def lr_maps(comparison: Comparison) -> list[Chart]:
    """Draw learning rate by batch size, for each row with several learning rates."""
    return _maps(comparison, "optimizer.lr", "batch_size", "batch size")


def lambda_maps(comparison: Comparison) -> list[Chart]:
    """Draw learning rate by lambda at each batch size, for each row with several lambdas."""
    return _maps(comparison, "optimizer.lmbda", "optimizer.lmbda", "lambda")


def _maps(comparison: Comparison, varied: str, x: str, name: str) -> list[Chart]:
    """Draw learning rate by ``x``, for each row with several values of ``varied``."""
    charts = []
    for row in comparison.rows:
        cells = comparison.row(row)
        if len(_values(cells, varied)) < 2:
            continue
        figure = go.Figure()
        switches = [] if x == "batch_size" else [batch_switch(cell.batch_size for cell in cells)]
        for of_map in [[cell] for cell in cells] if switches else [cells]:
            pick = {"batch": f"{of_map[0].batch_size}"} if switches else {}
            _add_map(figure, _places(of_map, x), _chosen_by(cells), comparison, pick)
        figure.update_layout(_map_layout(name, _values(cells, x), _values(cells, "optimizer.lr")))
        charts.append(Chart(f"{row_label(row)}: learning rate by {name}", _map_note(cells), figure, switches))
    return charts


def _tried(cells: Iterable[Cell]) -> list[Setting]:
    return [setting for cell in cells for setting in cell.settings if setting.tried]


def _text(setting: Setting, key: str) -> str:
    option = setting.options.get(key)
    return f"{option:,}" if key == "batch_size" else value(option)


def _values(cells: Iterable[Cell], key: str) -> list[str]:
    """Return the values of ``key`` in order, as axis labels."""
    settings = sorted(_tried(cells), key=lambda setting: value_order(setting.options.get(key)))
    return list(dict.fromkeys(_text(setting, key) for setting in settings))


def _places(cells: Iterable[Cell], x: str) -> Places:
    """Group settings by ``x`` and learning rate."""
    found: Places = {}
    for setting in _tried(cells):
        found.setdefault((_text(setting, x), _text(setting, "optimizer.lr")), []).append(setting)
    return found


def _chosen_by(cells: Sequence[Cell]) -> str:
    """Return the accuracy that a map shows: of validation if validation chose in all its cells."""
    return BY_VALIDATION if all(cell.chosen_by == BY_VALIDATION for cell in cells if cell.chosen) else BY_TEST


def _map_note(cells: Sequence[Cell]) -> str:
    which = "Best validation accuracy" if _chosen_by(cells) == BY_VALIDATION else "Test accuracy"
    several = any(len(settings) > 1 for settings in _places(cells, "batch_size").values())
    rest = " If several settings share a place, the map shows the best." if several else ""
    return f"{which} [%], mean over seeds. Bold: the chosen setting. ✕: diverged seeds. Grey: all seeds diverged.{rest}"


def _add_map(
    figure: go.Figure, places: Places, chosen_by: str, comparison: Comparison, pick: Mapping[str, str]
) -> None:
    """Add a heat map of the places with a finished run, and a grey one of those with diverged runs only."""
    digits = decimals(comparison)
    best = {
        place: max(settings, key=lambda setting: (bool(setting.finished), setting.score(chosen_by)))
        for place, settings in places.items()
    }
    means = {place: statistics.fmean(values) for place, s in best.items() if (values := s.values(chosen_by))}
    lost = {place: f"✕{len(setting.diverged)}" for place, setting in best.items() if setting.diverged}
    chosen = [id(cell.chosen) for cell in comparison.shown]
    text = {}
    for place, mean in means.items():
        number = f"{100 * mean:.{digits}f}"
        bold = any(id(setting) in chosen for setting in places[place])
        text[place] = " ".join(filter(None, [f"<b>{number}</b>" if bold else number, lost.get(place)]))
    gone = {place: text for place, text in lost.items() if place not in means}
    xs, ys = (list(dict.fromkeys(place[i] for place in places)) for i in (0, 1))
    shared = {"x": xs, "y": ys, "texttemplate": "%{text}", "xgap": 2, "ygap": 2, "meta": {"pick": pick}}
    if means:
        low, high = _extent(comparison)
        figure.add_heatmap(
            z=[[rounded(100 * means[x, y]) if (x, y) in means else None for x in xs] for y in ys],
            text=[[text.get((x, y), "") for x in xs] for y in ys],
            colorscale="Viridis", colorbar={"title": {"text": "%"}, "thickness": 12, "len": 0.9}, zmin=low, zmax=high,
            hovertemplate="%{x}, learning rate %{y}: %{text} %<extra></extra>", **shared,
        )  # fmt: skip
    if gone:
        figure.add_heatmap(
            z=[[1 if (x, y) in gone else None for x in xs] for y in ys],
            text=[[gone.get((x, y), "") for x in xs] for y in ys],
            colorscale=[[0, _DIVERGED], [1, _DIVERGED]], showscale=False,
            hovertemplate="%{x}, learning rate %{y}: diverged<extra></extra>", **shared,
        )  # fmt: skip


def _extent(comparison: Comparison) -> tuple[float, float]:
    """Return the range of the colours in per cent, the same in all maps of a comparison."""
    settings = _tried(comparison.shown)
    values = [v for metric in (BY_VALIDATION, BY_TEST) for s in settings if (v := s.values(metric))]
    means = [100 * statistics.fmean(of_setting) for of_setting in values]
    return rounded(min(means, default=0.0)), rounded(max(means, default=100.0))


def _map_layout(x: str, xs: Sequence[str], ys: Sequence[str]) -> dict[str, Any]:
    def axis(order: Sequence[str]) -> dict[str, Any]:
        # With a range: Plotly leaves out categories of hidden traces.
        return {
            "type": "category", "categoryorder": "array", "categoryarray": list(order), "showgrid": False,
            "range": [-0.5, len(order) - 0.5],
        }  # fmt: skip

    return layout(x, "learning rate", xaxis=axis(xs), yaxis=axis(ys), height=150 + 44 * max(len(ys), 2))
