"""Write the report as one HTML file that needs no network, no server and no account."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from largebatch.report import figures, layer_figures, maps, page_tables
from largebatch.report.chart import Chart, Styles, styles
from largebatch.report.compare import Comparison
from largebatch.report.curves import MOST_POINTS, Histories, default_target, progress_metric, reach, read_histories
from largebatch.report.fairness import warnings
from largebatch.report.layer_figures import Diagnosed
from largebatch.report.load import Problem, Run
from largebatch.report.wording import answer, row_label, title

# Points of all curves on the page, counted by cell. With all metrics, bands and axes a point takes about 600 bytes.
_BUDGET = 3_500
_FEWEST_POINTS = 24


def page(
    name: str, runs: Sequence[Run], problems: list[Problem], comparisons: Sequence[Comparison], target: float | None
) -> str:
    """Return the whole file.

    Args:
        name: name of the folder of runs.
        problems: what is left out so far. Unreadable metrics and layers are added.
        target: accuracy in 0..1. The page counts the steps to it. None: a target for each comparison.
    """
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    style = styles(comparisons)
    histories = [read_histories(comparison, problems) for comparison in comparisons]
    diagnosed = [layer_figures.read_diagnosed(comparison, problems) for comparison in comparisons]
    cells = sum(len(comparison.shown) for comparison in comparisons)
    points = max(_FEWEST_POINTS, min(MOST_POINTS, _BUDGET // max(cells, 1)))
    with_layers = max(sum(map(len, diagnosed)), 1)
    sections = [
        _section(f"c{number}", comparison, history, layers, len(layers) / with_layers, style, target, points)
        for number, (comparison, history, layers) in enumerate(zip(comparisons, histories, diagnosed, strict=True), 1)
    ]
    payload = {
        key: chart.figure.to_plotly_json() | {"axes": {s.key: s.axes for s in chart.switches if s.axes}}
        for section in sections for _, charts in section["groups"] for key, chart in charts
    }  # fmt: skip
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        name=name,
        sections=sections,
        problems=[(problem.where, problem.what) for problem in sorted(set(problems))],
        facts=page_tables.facts(runs),
        trouble=[
            (run.name, run.state, run.message)
            for run in runs
            if run.state in ("diverged", "failed", "preempted", "interrupted")
        ],
        payload=Markup(_in_script(json.dumps(payload, sort_keys=True, separators=(",", ":"), allow_nan=False))),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
    )


def _in_script(text: str) -> str:
    """Escape JSON for a script element, whatever its strings contain."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _section(
    anchor: str, comparison: Comparison, histories: Histories, layers: list[Diagnosed], share: float, style: Styles,
    target: float | None, points: int,
) -> dict[str, Any]:  # fmt: skip
    """Return the template's values for one comparison.

    Args:
        share: part of the page's budget of layers, 0..1.
        points: most points of a curve.
    """
    metric = progress_metric(comparison, histories)
    target = target or default_target(comparison, metric, histories)
    reached = {place: reach(cell, metric, target, histories) for place, cell in comparison.cells.items() if target}
    goal = f"{100 * target:.4g} % {figures.METRICS[metric]}" if target else ""
    few_layers = layer_figures.in_budget(layers, share)
    # A new chart needs its function in a file of figures and an entry here.
    groups: dict[str, list[Chart | None]] = {
        "Accuracy and training": [
            figures.accuracy_by_batch(comparison, style),
            figures.training_curves(comparison, histories, style, points),
        ],
        "Settings tried": [*maps.setting_maps(comparison)],
        "Speed": [
            figures.steps_to_target(comparison, reached, goal, style),
            figures.speed_by_batch(comparison, style),
        ],
        "Schedules and layers": [
            figures.schedules(comparison, histories, style, points),
        ],
    }
    if layers:
        groups["Schedules and layers"] += [
            layer_figures.middle_layer(layers, style),
            layer_figures.layer_lines(few_layers),
            layer_figures.layer_map(few_layers),
        ]
    return {
        "anchor": anchor,
        "title": title(comparison),
        "answer": answer(comparison),
        "warnings": warnings(comparison),
        "columns": [f"batch {batch:,}" for batch in comparison.columns],
        "rows": page_tables.comparison_table(comparison, style),
        "caption": page_tables.caption(comparison),
        "groups": [
            (name, [(f"{anchor}-{i}-{j}", chart) for j, chart in enumerate(filter(None, charts))])
            for i, (name, charts) in enumerate(groups.items())
        ],
        "goal": goal,
        "reached": page_tables.reached_table(comparison, reached),
        "labels": [row_label(row) for row in comparison.rows],
        "keys": page_tables.keys_table(comparison),
        "settings": page_tables.settings_table(comparison),
    }
