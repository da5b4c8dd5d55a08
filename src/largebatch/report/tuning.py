"""Draw tuning curves: the expected best accuracy against the number of trials, with confidence bands.

The curve is the mean of the best of k trials, over all choices of k from the n trials of a cell. The band follows
Lourie, Cho and He, "Show Your Work with Confidence" (arXiv 2311.09480), from the order statistics of uniform random
numbers. Their package opda simulates the band's level; here it is computed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from scipy.special import betaincinv, gammaln, xlogy

from largebatch.report.cells import BY_TEST, BY_VALIDATION, Cell
from largebatch.report.chart import Chart, Styles, Switch, batch_switch, filled, line, new_figure, rounded, safe
from largebatch.report.compare import Comparison
from largebatch.report.load import thinned
from largebatch.report.wording import plural, row_label

CONFIDENCE = 0.95
FEWEST_TRIALS = 3
_MOST_POINTS = 60  # of a curve

Array = NDArray[np.float64]


def expected_best(scores: Sequence[float], k: int) -> float:
    """Return the mean of the best of ``k`` scores, over all choices of ``k`` of the ``n`` scores.

    The i-th smallest score is the best of C(i - 1, k - 1) of the C(n, k) choices. For independent trials, the mean is
    an unbiased estimate of the expected best of ``k`` trials.
    """
    ways = math.comb(len(scores), k)
    return sum(math.comb(i, k - 1) / ways * score for i, score in enumerate(sorted(scores)))


def band(scores: Sequence[float], ks: Sequence[int]) -> tuple[Array, Array]:
    """Return the lower and the upper limit of the expected best of k trials, for each k.

    The true curve lies between the limits at all k with a probability of at least ``CONFIDENCE``, if the trials are
    independent draws from one distribution on 0..1. The probability is exact if the distribution is continuous.

    With P(best of k <= x) = F(x)^k, the limits are the expectations for the largest and the smallest distribution
    function F that ``cdf_limits`` allows.
    """
    low, high = cdf_limits(len(scores))
    values = np.sort(np.asarray(scores, dtype=np.float64))
    k = np.asarray(ks, dtype=np.float64)[:, None]
    # The largest F puts the probability high[0] at 0, the smallest F 1 - low[-1] at 1.
    lower = np.diff(np.append(high, 1.0) ** k) @ values
    upper = np.diff(np.insert(low, 0, 0.0) ** k) @ values + 1 - low[-1] ** k[:, 0]
    return lower, upper


@functools.cache
def cdf_limits(n: int) -> tuple[Array, Array]:
    """Return limits of the distribution function F at the order statistics of ``n`` trials, each of shape [n].

    F at the i-th smallest trial is distributed as the i-th smallest of n uniform numbers, Beta(i, n + 1 - i). Each
    interval leaves out ``tail`` of this distribution, half on each side. The tail is the largest for which all
    intervals hold together with probability ``CONFIDENCE``.
    """
    ranks = np.arange(1, n + 1)

    def limits(tail: float) -> tuple[Array, Array]:
        return betaincinv(ranks, n + 1 - ranks, tail / 2), betaincinv(ranks, n + 1 - ranks, 1 - tail / 2)

    held, missed = (1 - CONFIDENCE) / n, 1 - CONFIDENCE  # the first is enough for n intervals, the second for one
    for _ in range(30):
        tail = (held + missed) / 2
        if coverage(*limits(tail)) >= CONFIDENCE:
            held = tail
        else:
            missed = tail
    return limits(held)


def coverage(low: Array, high: Array) -> float:
    """Return the probability that each of n uniform order statistics lies between its limits.

    Args:
        low: lower limit of the i-th smallest of n uniform numbers, ascending. Shape [n].
        high: upper limit, ascending. Shape [n].

    The limits hold if the number of points up to t is at least i at each t = high[i], and less than i just before each
    t = low[i]. The points are a Poisson process of rate n on 0..1, on condition that it has n points.
    """
    n = len(low)
    times = np.sort(np.concatenate([low, high, [1.0]]))
    fewest, most = np.searchsorted(high, times, side="right"), np.searchsorted(low, times, side="left")
    chances, first, now = np.ones(1), 0, 0.0  # chances[c]: of first + c points so far
    for time, least, largest in zip(times, fewest, most, strict=True):
        new = np.arange(largest - first + 1)
        jumps = np.exp(xlogy(new, n * (time - now)) - n * (time - now) - gammaln(new + 1))
        chances = np.convolve(chances, jumps)[least - first : largest - first + 1]
        first, now = least, time
    return float(chances[0] / np.exp(xlogy(n, n) - n - gammaln(n + 1)))


def tuning_curves(comparison: Comparison, style: Styles) -> Chart | None:
    """Draw the curve of each row with at least ``FEWEST_TRIALS`` trials, and the band of one row, at one batch size."""
    cells = [cell for cell in comparison.cells.values() if cell.chosen and cell.trials >= FEWEST_TRIALS]
    if not cells:
        return None
    metric = BY_VALIDATION if all(cell.chosen_by == BY_VALIDATION for cell in cells) else BY_TEST
    images = "validation" if metric == BY_VALIDATION else "test"
    ticks = math.ceil(max(cell.trials for cell in cells) / 10)  # whole numbers, at most ten of them
    figure = new_figure("trials", "expected best accuracy [%]", xaxis={"dtick": ticks})
    ranges: dict[int, list[float]] = {}
    for cell in cells:
        drawn = _add_curve(figure, cell, metric, style)
        ranges.setdefault(cell.batch_size, []).extend(drawn)
    note = (
        f"Mean of the best {images} accuracy of several trials, over all choices of them. A diverged seed counts as 0. "
        "Compare optimizers at equal numbers of trials. The band contains the whole true curve with "
        f"{100 * CONFIDENCE:.0f} % confidence if the trials are independent random draws. For a grid, the band is "
        "approximate. Double-click the chart to see a large band whole."
    )
    switch = batch_switch(ranges)
    for batch, values in ranges.items():
        margin = max(0.25 * (max(values) - min(values)), 1.0)
        limits = [rounded(max(min(values) - margin, -1)), rounded(min(max(values) + margin, 101))]
        switch.axes[f"{batch}"] = {"yaxis.range": limits}
    labels = dict.fromkeys(row_label(cell.row) for cell in cells)
    return Chart("Tuning curves", note, figure, [switch, Switch("band", "band of", [(name, name) for name in labels])])


def _add_curve(figure: go.Figure, cell: Cell, metric: str, style: Styles) -> list[float]:
    """Add a cell's curve and band. Return the curve in per cent."""
    scores = [max(setting.score(metric) for setting in trial) for trial in cell.attempts]
    ks = thinned(list(range(1, len(scores) + 1)), _MOST_POINTS)
    curve = [rounded(100 * expected_best(scores, k)) for k in ks]
    lower, upper = band(scores, ks)
    label = safe(row_label(cell.row))
    pick = {"batch": f"{cell.batch_size}"}
    edge = [rounded(100 * float(limit)) for limit in (*upper, *lower[::-1])]
    figure.add_scatter(
        x=[*ks, *ks[::-1]], y=edge, meta={"pick": pick | {"band": row_label(cell.row)}}, legendgroup=label,
        **filled(style[cell.row]),
    )  # fmt: skip
    texts = [
        f"{label}, best of {plural(k, 'trial')}: {y:.4g} % ({100 * low:.4g} to {100 * high:.4g})"
        for k, y, low, high in zip(ks, curve, lower, upper, strict=True)
    ]
    marker = {"color": style[cell.row].colour, "symbol": style[cell.row].symbol, "size": 7}
    figure.add_scatter(
        x=ks, y=curve, name=label, hovertext=texts, hoverinfo="text", marker=marker, meta={"pick": pick},
        legendgroup=label, **line(style[cell.row]) | {"mode": "lines+markers"},
    )  # fmt: skip
    return curve
