"""Curves over training: means over seeds, and how soon a target is reached."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from largebatch.report.compare import Cell, Comparison
from largebatch.report.load import Problem, Run, number, read_history, thinned
from largebatch.runs.metrics import Row

MOST_POINTS = 120  # of a curve: more than a screen tells apart

Histories = dict[str, list[Row]]  # by the run's name


@dataclass(frozen=True)
class Curve:
    """A metric of one cell's runs: their mean at each step that all of them logged, and its spread over seeds.

    ``spread`` is the sample standard deviation at each step; None with a single run.
    """

    cell: Cell
    steps: list[float]
    epochs: list[float]
    seconds: list[float]
    mean: list[float]
    spread: list[float] | None


@dataclass(frozen=True)
class Reached:
    """How soon one cell's runs reached a target: medians over those that did, None where none did."""

    cell: Cell
    runs: int
    reached: int
    steps: float | None
    epochs: float | None
    seconds: float | None


def read_histories(comparison: Comparison, problems: list[Problem]) -> Histories:
    """Of the runs that are drawn: those of the settings shown."""
    return {run.name: read_history(run, problems) for cell in comparison.shown for run in drawn(cell)}


def drawn(cell: Cell) -> list[Run]:
    """The runs of a cell that curves are of: those that finished; where none did, those that diverged."""
    return (cell.shown.finished or cell.shown.diverged) if cell.shown else []


def curve(cell: Cell, metric: str, histories: Histories, most_points: int = MOST_POINTS) -> Curve | None:
    """None where no two points of ``metric`` are known."""
    series = [points for run in drawn(cell) if (points := _points(histories[run.name], metric))]
    if not series:
        return None
    common = sorted(set.intersection(*(set(points) for points in series)))
    if len(common) < 2:
        return None
    steps = thinned(common, most_points)
    values = [[points[step][0] for points in series] for step in steps]
    return Curve(
        cell,
        steps=steps,
        epochs=[series[0][step][1] for step in steps],
        seconds=[statistics.fmean(points[step][2] for points in series) for step in steps],
        mean=[statistics.fmean(at_step) for at_step in values],
        spread=[statistics.stdev(at_step) for at_step in values] if len(series) > 1 else None,
    )


def _points(rows: Iterable[Row], metric: str) -> dict[float, tuple[float, float, float]]:
    """Value, epoch and seconds by step, where the value is a finite number."""
    found = {}
    for row in rows:
        value, epoch, seconds = (number(row.get(name)) for name in (metric, "epoch", "wall_seconds"))
        if value is not None and epoch is not None and seconds is not None:
            found[row["step"]] = value, epoch, seconds
    return found


def progress_metric(comparison: Comparison, histories: Histories) -> str:
    """The accuracy that grows while the main training goes on, on held-out images where there are some."""
    name = "knn_accuracy" if comparison.mode == "bt" else "accuracy"
    evaluated = [rows for rows in histories.values() if any(f"test/{name}" in row for row in rows)]
    held_out = evaluated and all(any(f"val/{name}" in row for row in rows) for rows in evaluated)
    return f"{'val' if held_out else 'test'}/{name}"


def default_target(comparison: Comparison, metric: str, histories: Histories) -> float | None:
    """The highest whole per cent that every seed of at least half of the cells reached; None where there is none."""
    worst_seeds = sorted(
        min(max((point[0] for point in points.values()), default=0.0) for points in series)
        for cell in comparison.shown
        if (series := [_points(histories[run.name], metric) for run in drawn(cell)])
    )
    target = math.floor(100 * worst_seeds[len(worst_seeds) // 2]) / 100 if worst_seeds else 0.0
    return target or None


def reach(cell: Cell, metric: str, target: float, histories: Histories) -> Reached:
    """The first evaluation of each run at which ``metric`` is ``target`` or more."""
    series = [_points(histories[run.name], metric) for run in drawn(cell)]
    hits = []
    for points in series:
        step = next((step for step in sorted(points) if points[step][0] >= target), None)
        if step is not None:
            hits.append((step, points[step][1], points[step][2]))
    steps, epochs, seconds = (
        (statistics.median(values) for values in zip(*hits, strict=True)) if hits else (None, None, None)
    )
    return Reached(cell, len(series), len(hits), steps, epochs, seconds)
