"""Draw steps to a target against batch size, with each row's hyperbola."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from largebatch.report.chart import Chart, Styles, batch_axis, line, log_axis, new_figure, rounded, safe
from largebatch.report.compare import Comparison
from largebatch.report.critical import Critical
from largebatch.report.wording import row_label

_POINTS = 33  # of a line


def critical_chart(comparison: Comparison, found: Sequence[Critical], goal: str, style: Styles) -> Chart | None:
    """Draw the rows whose hyperbola is known, or None. ``goal``: the target in words."""
    fitted = [one for one in found if one.steps and one.batch_size and math.isfinite(one.batch_size.value)]
    if not fitted:
        return None
    figure = new_figure("batch size", "optimizer steps, logarithmic", xaxis=batch_axis(comparison.columns))
    for one in fitted:
        label, look = safe(row_label(one.row)), style[one.row]
        known = [(time.batch_size, time.steps, time.deviation) for time in one.times if time.steps]
        assert one.steps is not None
        assert one.batch_size is not None
        sizes = np.geomspace(known[0][0], known[-1][0], _POINTS)
        steps = one.steps.value * (1 + one.batch_size.value / sizes)
        figure.add_scatter(
            x=[rounded(size) for size in sizes], y=[rounded(step) for step in steps], hoverinfo="skip",
            showlegend=False, legendgroup=label, **line(look),
        )  # fmt: skip
        figure.add_scatter(
            x=[size for size, _, _ in known], y=[rounded(step) for _, step, _ in known], name=label, legendgroup=label,
            error_y={"type": "data", "array": [rounded(step * error, 3) for _, step, error in known], "thickness": 1.5},
            hovertemplate=f"{label}, batch %{{x:,}}: %{{y:,.0f}} steps<extra></extra>",
            mode="markers", marker={"color": look.colour, "symbol": look.symbol, "size": 9},
        )  # fmt: skip
    axis = log_axis(trace.y for trace in figure.data)
    measured = [(one, one.noise) for one in fitted if one.noise]
    for one, noise in measured:
        label = safe(row_label(one.row))
        figure.add_scatter(
            x=[rounded(noise.value)] * 2, y=[f(y for trace in figure.data for y in trace.y) for f in (min, max)],
            showlegend=False, legendgroup=label, mode="lines",
            line={"color": style[one.row].colour, "dash": "dot", "width": 1.5},
            hovertemplate=f"{label}: noise scale {safe(noise.text)}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(yaxis=axis)
    limits = "; ".join(f"{row_label(one.row)} {one.batch_size.text}" for one in found if one.batch_size)
    unknown = [row_label(one.row) for one in found if not one.batch_size]
    note = (
        f"Steps to {goal}: medians over seeds, with standard errors, and the hyperbola S = S_min * (1 + B_crit / B) of "
        "arXiv 1812.06162. At the critical batch size, training takes twice the fewest possible steps and twice the "
        f"fewest images. With 90 % intervals: {limits}."
    )
    if measured:
        scales = "; ".join(f"{row_label(one.row)} {noise.text}" for one, noise in measured)
        note += f" Dotted lines: the measured gradient noise scale, {scales}."
    note += f" Too few batch sizes reached the target: {', '.join(unknown)}." if unknown else ""
    return Chart("Critical batch size", note, figure)
