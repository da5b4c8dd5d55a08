"""The report as one HTML file that needs nothing else: no network, no server, no account."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largebatch.report.chart import Chart, Style, styles
from largebatch.report.compare import Comparison, RowKey
from largebatch.report.curves import (
    MOST_POINTS,
    Histories,
    default_target,
    progress_metric,
    reach,
    read_histories,
)
from largebatch.report.fairness import warnings
from largebatch.report.figures import (
    METRICS,
    accuracy_by_batch,
    schedules,
    speed_by_batch,
    steps_to_target,
    training_curves,
)
from largebatch.report.layer_figures import (
    Diagnosed,
    in_budget,
    layer_lines,
    layer_map,
    middle_layer,
    read_diagnosed,
)
from largebatch.report.load import Problem, Run
from largebatch.report.maps import lambda_maps, rate_maps
from largebatch.report.page_tables import caption, comparison_table, facts, keys_table, reached_table, settings_table
from largebatch.report.wording import answer, row_label, title

Section = dict[str, Any]

# Points of curves on the whole page, counted by cell: with all metrics, bands and axes some 600 bytes each.
_BUDGET = 3_500
_FEWEST_POINTS = 24


@dataclass(frozen=True)
class Group:
    """Charts under one heading."""

    title: str
    charts: Sequence[Chart | None]


def page(
    name: str, runs: Sequence[Run], problems: list[Problem], comparisons: Sequence[Comparison], target: float | None
) -> str:
    """The whole file.

    Args:
        name: of the folder of runs.
        problems: what was left out so far; files that turn out to be unreadable are added.
        target: accuracy in 0..1 that the steps to are reported; None: one a comparison, from what was reached.
    """
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    style = styles(comparisons)
    histories = [read_histories(comparison, problems) for comparison in comparisons]
    diagnosed = [read_diagnosed(comparison, problems) for comparison in comparisons]
    cells = sum(len(comparison.shown) for comparison in comparisons)
    points = max(_FEWEST_POINTS, min(MOST_POINTS, _BUDGET // max(cells, 1)))
    sections = [
        _section(
            comparison, history, in_budget(layers, len(layers) / max(sum(map(len, diagnosed)), 1)), layers, style,
            target, points, f"c{number}",
        )
        for number, (comparison, history, layers) in enumerate(zip(comparisons, histories, diagnosed, strict=True), 1)
    ]  # fmt: skip
    payload = {chart["id"]: chart.pop("data") for s in sections for g in s["groups"] for chart in g["charts"]}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        name=name,
        sections=sections,
        problems=sorted(set(problems), key=lambda problem: (problem.where, problem.what)),
        facts=facts(runs),
        trouble=[run for run in runs if run.state in ("diverged", "failed", "preempted", "interrupted")],
        payload=Markup(_in_script(json.dumps(payload, sort_keys=True, separators=(",", ":"), allow_nan=False))),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
    )


def _in_script(text: str) -> str:
    """JSON that can stand in a script element, whatever is in its strings."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _section(
    comparison: Comparison, histories: Histories, layers: list[Diagnosed], all_layers: list[Diagnosed],
    style: Mapping[RowKey, Style], target: float | None, points: int, anchor: str,
) -> Section:  # fmt: skip
    metric = progress_metric(comparison, histories)
    if target is None:
        target = default_target(comparison, metric, histories)
    reached = [reach(cell, metric, target, histories) for cell in comparison.shown] if target is not None else []
    goal = f"{100 * target:.4g} % {METRICS[metric]}" if target is not None else ""
    groups = [
        Group("Accuracy and training", [accuracy_by_batch(comparison, style),
                                        training_curves(comparison, histories, style, points)]),
        Group("Which settings were tried", [*rate_maps(comparison), *lambda_maps(comparison)]),
        Group("How fast", [steps_to_target(comparison, reached, goal, style), speed_by_batch(comparison, style)]),
        Group("Why: schedules and layers", [
            schedules(comparison, histories, style, points),
            *([middle_layer(all_layers, style), layer_lines(layers), layer_map(layers)] if layers else []),
        ]),
    ]  # fmt: skip
    return {
        "anchor": anchor,
        "title": title(comparison),
        "answer": answer(comparison),
        "warnings": warnings(comparison),
        "columns": [f"{batch:,}" for batch in comparison.columns],
        "rows": comparison_table(comparison, style),
        "caption": caption(comparison),
        "groups": [_charts(group, f"{anchor}-{i}") for i, group in enumerate(groups)],
        "goal": goal,
        "reached": reached_table(comparison, reached),
        "labels": [row_label(row) for row in comparison.rows],
        "keys": keys_table(comparison),
        "settings": settings_table(comparison),
    }


def _charts(group: Group, prefix: str) -> Section:
    charts = [chart for chart in group.charts if chart is not None]
    return {
        "title": group.title,
        "charts": [
            {
                "id": f"{prefix}-{i}",
                "title": chart.title,
                "note": chart.note,
                "switches": chart.switches,
                "data": chart.figure.to_plotly_json() | {"axes": {s.key: s.axes for s in chart.switches if s.axes}},
            }
            for i, chart in enumerate(charts)
        ],
    }
