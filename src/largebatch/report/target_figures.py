"""Draw time to target against batch size, and performance profiles."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from largebatch.report.cells import Cell
from largebatch.report.chart import Chart, Styles, Switch, line, log_axis, new_figure, rounded, safe
from largebatch.report.compare import Comparison
from largebatch.report.figures import Point, by_batch
from largebatch.report.profiles import MEASURES, MOST, Profiles, profile
from largebatch.report.targets import TimeToTarget
from largebatch.report.wording import plural, row_label

_AXES = {
    "steps": "optimizer steps", "epochs": "epochs", "images": "images seen in training", "seconds": "wall time [s]",
}  # fmt: skip


def time_by_batch(comparison: Comparison, times: TimeToTarget, style: Styles) -> Chart | None:
    """Draw the median time to target over batch sizes, in one measure at a time."""
    drawn: dict[str, go.Figure] = {}
    for measure in _AXES:

        def point(cell: Cell, measure: str = measure) -> Point | None:
            median = times.cells[cell.row, cell.batch_size].median
            at = getattr(median, measure) if median else math.inf
            # A logarithmic axis has no 0, the steps of features that are good before training.
            if math.isinf(at) or not at:
                return None
            return at, None, f"{at:,.0f} {measure}" if measure in ("steps", "images") else f"{at:.4g} {measure}"

        drawn[measure] = by_batch("", "", _AXES[measure], comparison, style, point).figure
    if not drawn["steps"].data:
        return None
    figure = go.Figure(layout=drawn["steps"].layout)
    axes = {}
    for measure, part in drawn.items():
        for trace in part.data:
            figure.add_trace(trace.update(meta={"pick": {"measure": measure}}))
        axis = log_axis(trace.y for trace in part.data)
        axes[measure] = {f"yaxis.{key}": value for key, value in axis.items()} | {
            "yaxis.title.text": f"{_AXES[measure]}, logarithmic"
        }
    never = [
        f"{row_label(row)} at {batch:,} ({result.reached} of {plural(len(result.seeds), 'seed')})"
        for (row, batch), result in times.cells.items()
        if result.median and math.isinf(result.median.steps)
    ]
    note = (
        "Training until the first evaluation or log entry that reaches the target: median over seeds of the chosen "
        "setting, where a seed that never reaches it counts as infinity. Lower is better."
    )
    note += f" Not drawn because the median is infinite: {', '.join(never)}." if never else ""
    switch = Switch("measure", "in", [(measure, measure) for measure in _AXES], axes)
    return Chart(f"Time to {times.goal.text}", note, figure, [switch])


def profile_chart(found: Profiles, style: Styles) -> Chart:
    """Draw the profile of each row, by steps or by wall time."""
    figure = new_figure(
        "factor tau",
        "fraction of workloads",
        xaxis={"range": [1, MOST]},
        yaxis={"range": [-0.02, 1.02], "tickformat": ".0%"},
    )
    for measure, of_rows in found.ratios.items():
        for row, ratios in of_rows.items():
            label = safe(row_label(row))
            taus, fractions = zip(*profile(ratios), strict=True)
            figure.add_scatter(
                x=[rounded(tau) for tau in taus], y=[rounded(fraction) for fraction in fractions], name=label,
                meta={"pick": {"measure": measure}},
                hovertemplate=f"{label}: %{{y:.0%}} within %{{x:.3g}} times the fastest<extra></extra>",
                **line(style[row]) | {"line": line(style[row])["line"] | {"shape": "hv"}},
            )  # fmt: skip
    note = (
        "Fraction of workloads in which an optimizer reaches the target in at most tau times the time of the fastest "
        "optimizer drawn here. Higher is better. A workload without a time counts as not reached."
    )
    switch = Switch("measure", "time in", [(measure, measure) for measure in MEASURES])
    return Chart(f"Performance profiles over {plural(len(found.workloads), 'workload')}", note, figure, [switch])
