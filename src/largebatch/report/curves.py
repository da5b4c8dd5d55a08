"""Compute curves over training, averaged over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import NamedTuple

from largebatch.config.modes import MODES
from largebatch.report.cells import Cell
from largebatch.report.compare import Comparison
from largebatch.report.load import Problem, number, read_history, thinned
from largebatch.runs.metrics import Row

MOST_POINTS = 120  # points of a curve: a screen shows no more

Histories = dict[str, list[Row]]  # by the run's name

# Metrics with the page's words for them, in the order of the menu.
METRICS = {
    "test/accuracy": "test accuracy", "val/accuracy": "validation accuracy", "train/accuracy": "training accuracy",
    "test/loss": "test loss", "val/loss": "validation loss", "train/loss": "training loss",
    "test/knn_accuracy": "nearest-neighbour test accuracy",
    "val/knn_accuracy": "nearest-neighbour validation accuracy", "probe/loss": "probe loss",
    "embedding/std": "standard deviation of embeddings", "embedding/effective_rank": "effective rank of embeddings",
}  # fmt: skip
SHARPNESS = {
    "sharpness/eigenvalue": "largest eigenvalue of the Hessian",
    "sharpness/preconditioned": "largest preconditioned eigenvalue", "sharpness/trace": "trace of the Hessian",
    "sharpness/sam": "rise within SAM's radius", "sharpness/asam": "rise within ASAM's radius",
}  # fmt: skip
NOISE = {
    "noise/scale": "gradient noise scale [images]", "noise/cosine": "cosine of successive gradients",
    "noise/variance": "variance of an image's gradient",
}  # fmt: skip


class Progress(NamedTuple):
    """Training so far."""

    steps: float
    epochs: float
    images: float
    seconds: float


class Curve(NamedTuple):
    """Mean of a metric over a cell's runs, at each step that all of them logged.

    Attributes:
        at: progress at each point. Seconds are averaged, the rest is the same for all runs.
        limits: band around the mean at each step; None without a band, or at a step without one. It is the mean of the
            logged intervals (``METRIC_low`` and ``METRIC_high``) if there are any. Else it is the sample standard
            deviation over seeds on both sides of the mean.
    """

    at: list[Progress]
    mean: list[float]
    limits: list[tuple[float, float] | None] | None


def read_histories(comparison: Comparison, problems: list[Problem]) -> Histories:
    """Read the histories of the reported runs that finished or diverged. If a cell reports none, of those to draw."""
    runs = [run for cell in comparison.shown for run in cell.reported or cell.drawn if run.done]
    return {run.name: read_history(run, problems) for run in runs}


def curve(cell: Cell, metric: str, histories: Histories, most_points: int = MOST_POINTS) -> Curve | None:
    """Return the curve of ``metric``, dense at the start. None without points.

    A single point counts only if every run of the cell diverged.
    """
    series = [points for run in cell.drawn if (points := points_of(histories[run.name], metric))]
    common = sorted(set.intersection(*map(set, series))) if series else []
    if len(common) < (2 if cell.chosen else 1):
        return None
    steps = thinned(common, most_points, power=2)
    values = [[points[step][0] for points in series] for step in steps]
    means = [statistics.fmean(at_step) for at_step in values]
    return Curve(
        at=[
            series[0][step][1]._replace(seconds=statistics.fmean(points[step][1].seconds for points in series))
            for step in steps
        ],
        mean=means,
        limits=_intervals(cell, metric, histories, steps) or _spreads(means, values),
    )


def _intervals(
    cell: Cell, metric: str, histories: Histories, steps: list[float]
) -> list[tuple[float, float] | None] | None:
    """Return the mean of the runs' intervals at each step at which all runs have one. None without intervals."""
    ends = [
        [points_of(histories[run.name], f"{metric}{end}") for run in cell.drawn if histories[run.name]]
        for end in ("_low", "_high")
    ]
    if not any(ends[0]):
        return None
    found: list[tuple[float, float] | None] = []
    for step in steps:
        low, high = ([points[step][0] for points in of_runs if step in points] for of_runs in ends)
        whole = len(low) == len(ends[0]) and len(high) == len(ends[1])
        found.append((statistics.fmean(low), statistics.fmean(high)) if whole else None)
    return found


def _spreads(means: list[float], values: list[list[float]]) -> list[tuple[float, float] | None] | None:
    spreads = [statistics.stdev(at_step) if len(at_step) > 1 else 0.0 for at_step in values]
    if not any(spreads):
        return None
    return [(mean - spread, mean + spread) for mean, spread in zip(means, spreads, strict=True)]


def points_of(rows: Iterable[Row], metric: str) -> dict[float, tuple[float, Progress]]:
    """Return value and progress by step, for the rows whose value is a finite number."""
    found = {}
    for row in rows:
        value, *at = (number(row.get(name)) for name in (metric, "epoch", "examples", "wall_seconds"))
        known = [part for part in at if part is not None]
        if value is not None and len(known) == len(at):
            found[row["step"]] = value, Progress(row["step"], *known)
    return found


def progress_metric(comparison: Comparison, histories: Histories) -> str:
    """Return the accuracy that the main training improves: on validation images if all runs have them."""
    name = MODES[comparison.mode].progress
    evaluated = [rows for rows in histories.values() if any(f"test/{name}" in row for row in rows)]
    held_out = evaluated and all(any(f"val/{name}" in row for row in rows) for rows in evaluated)
    return f"{'val' if held_out else 'test'}/{name}"
