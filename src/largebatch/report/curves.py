"""Compute curves over training, averaged over seeds, and the step at which runs reach a target."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from largebatch.config.modes import MODES
from largebatch.report.compare import Cell, Comparison
from largebatch.report.load import Problem, number, read_history, thinned
from largebatch.runs.metrics import Row

MOST_POINTS = 120  # points of a curve: a screen shows no more

Histories = dict[str, list[Row]]  # by the run's name


class Progress(NamedTuple):
    """Training so far."""

    steps: float
    epochs: float
    seconds: float


class Curve(NamedTuple):
    """Mean of a metric over a cell's runs, at each step that all of them logged.

    Attributes:
        at: progress at each point. Steps and epochs are the same for all runs, seconds are averaged.
        spread: sample standard deviation over seeds at each step. None with a single run.
    """

    at: list[Progress]
    mean: list[float]
    spread: list[float] | None


class Reached(NamedTuple):
    """Training that a cell's runs needed to reach a target.

    Attributes:
        runs: number of runs.
        reached: number of runs that reached the target.
        at: medians over the runs that reached it. None if none did.
    """

    runs: int
    reached: int
    at: Progress | None


def read_histories(comparison: Comparison, problems: list[Problem]) -> Histories:
    """Read the histories of all runs with a curve."""
    return {run.name: read_history(run, problems) for cell in comparison.shown for run in cell.drawn}


def curve(cell: Cell, metric: str, histories: Histories, most_points: int = MOST_POINTS) -> Curve | None:
    """Return the curve of ``metric``, dense at the start. None without points.

    A single point counts only if every run of the cell diverged.
    """
    series = [points for run in cell.drawn if (points := _points(histories[run.name], metric))]
    common = sorted(set.intersection(*map(set, series))) if series else []
    if len(common) < (2 if cell.chosen else 1):
        return None
    steps = thinned(common, most_points, power=2)
    values = [[points[step][0] for points in series] for step in steps]
    return Curve(
        at=[
            Progress(step, series[0][step][1].epochs, statistics.fmean(points[step][1].seconds for points in series))
            for step in steps
        ],
        mean=[statistics.fmean(at_step) for at_step in values],
        spread=[statistics.stdev(at_step) for at_step in values] if len(series) > 1 else None,
    )


def _points(rows: Iterable[Row], metric: str) -> dict[float, tuple[float, Progress]]:
    """Return value and progress by step, for the rows whose value is a finite number."""
    found = {}
    for row in rows:
        value, epochs, seconds = (number(row.get(name)) for name in (metric, "epoch", "wall_seconds"))
        if value is not None and epochs is not None and seconds is not None:
            found[row["step"]] = value, Progress(row["step"], epochs, seconds)
    return found


def progress_metric(comparison: Comparison, histories: Histories) -> str:
    """Return the accuracy that the main training improves: on validation images if all runs have them."""
    name = MODES[comparison.mode].progress
    evaluated = [rows for rows in histories.values() if any(f"test/{name}" in row for row in rows)]
    held_out = evaluated and all(any(f"val/{name}" in row for row in rows) for rows in evaluated)
    return f"{'val' if held_out else 'test'}/{name}"


def default_target(comparison: Comparison, metric: str, histories: Histories) -> float | None:
    """Return the highest whole percentage that every seed of at least half of the cells reached. None if it is 0."""
    worst_seeds = sorted(
        min(max((value for value, _ in points.values()), default=0.0) for points in series)
        for cell in comparison.shown
        if (series := [_points(histories[run.name], metric) for run in cell.drawn])
    )
    target = math.floor(100 * worst_seeds[len(worst_seeds) // 2]) / 100 if worst_seeds else 0.0
    return target or None


def reach(cell: Cell, metric: str, target: float, histories: Histories) -> Reached:
    """Find each run's first evaluation with ``metric`` at or above ``target``."""
    series = [_points(histories[run.name], metric) for run in cell.drawn]
    firsts = (next((points[step] for step in sorted(points) if points[step][0] >= target), None) for points in series)
    hits = [first[1] for first in firsts if first]
    medians = Progress(*map(statistics.median, zip(*hits, strict=True))) if hits else None
    return Reached(len(series), len(hits), medians)
