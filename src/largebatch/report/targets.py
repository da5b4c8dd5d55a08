"""Measure the training that each cell needs to reach a target. A seed that never reaches it needs infinitely much."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import NamedTuple

from largebatch.report.cells import Cell, Place
from largebatch.report.compare import Comparison
from largebatch.report.curves import METRICS, Histories, Progress, points_of, progress_metric
from largebatch.report.wording import plural, states

TARGET_METRICS = [name for name in METRICS if name.endswith(("accuracy", "loss"))]
_NEVER = Progress(math.inf, math.inf, math.inf, math.inf)


class Target(NamedTuple):
    """Target that the user asks for.

    Attributes:
        value: accuracy in 0..1, or a loss. None: a target for each comparison.
        metric: one of ``TARGET_METRICS``. None: the accuracy that the main training improves.
    """

    value: float | None = None
    metric: str | None = None


class Goal(NamedTuple):
    """Target of a comparison: an accuracy to reach or exceed, or a loss to reach or undercut."""

    metric: str
    value: float

    @property
    def text(self) -> str:
        if self.metric.endswith("loss"):
            return f"a {METRICS[self.metric]} of {self.value:.4g}"
        return f"{100 * self.value:.4g} % {METRICS[self.metric]}"

    def met(self, value: float) -> bool:
        return value <= self.value if self.metric.endswith("loss") else value >= self.value


@dataclass(frozen=True)
class Reached:
    """Training that a cell's reported runs needed to reach a target.

    Attributes:
        seeds: for each finished or diverged run, the progress at its first row that meets the target. Infinite if there
            is no such row.
        before: for each of them, the step of the row before, or 0 without such a row.
        left_out: reported runs that don't count, in words: they failed, haven't finished, or logged no such
            metric.
    """

    seeds: list[Progress]
    before: list[float]
    left_out: list[str]

    @property
    def reached(self) -> int:
        return sum(seed != _NEVER for seed in self.seeds)

    @property
    def median(self) -> Progress | None:
        """Medians over seeds, infinite if too few seeds reached the target. None without a counted seed."""
        return Progress(*map(statistics.median, zip(*self.seeds, strict=True))) if self.seeds else None


class TimeToTarget(NamedTuple):
    """Target of a comparison, and the training that each cell needed to reach it."""

    goal: Goal
    cells: dict[Place, Reached]


def time_to_target(comparison: Comparison, histories: Histories, target: Target) -> TimeToTarget | None:
    """Return None if the comparison has no target, because too few seeds learned anything."""
    metric = target.metric or progress_metric(comparison, histories)
    value = target.value or default_target(comparison, metric, histories)
    if not value:
        return None
    goal = Goal(metric, value)
    return TimeToTarget(goal, {place: reach(cell, goal, histories) for place, cell in comparison.cells.items()})


def default_target(comparison: Comparison, metric: str, histories: Histories) -> float | None:
    """Return the highest whole percentage that every seed of at least half of the cells reached. None if it is 0."""
    worst_seeds = sorted(
        min(max((value for value, _ in points.values()), default=0.0) for points in series)
        for cell in comparison.shown
        if (series := [points_of(histories[run.name], metric) for run in cell.drawn])
    )
    target = math.floor(100 * worst_seeds[len(worst_seeds) // 2]) / 100 if worst_seeds else 0.0
    return target or None


def reach(cell: Cell, goal: Goal, histories: Histories) -> Reached:
    """Find the first row that meets the goal, for each reported run.

    If no setting is chosen, the runs are those of the first setting with a diverged run. A run that meets the goal and
    diverges later has reached it.
    """
    runs = cell.reported or next((setting.runs for setting in cell.settings if setting.diverged), cell.runs)
    seeds, before, without = [], [], 0
    for run in runs:
        if run.done:
            points = points_of(histories[run.name], goal.metric)
            if not points and run.state == "finished":
                without += 1
                continue
            seeds.append(next((points[step][1] for step in sorted(points) if goal.met(points[step][0])), _NEVER))
            before.append(max((step for step in points if step < seeds[-1].steps), default=0.0))
    left_out = states(run for run in runs if not run.done)
    return Reached(seeds, before, [*left_out, *([f"{without} without {goal.metric}"] if without else [])])


def reached_table(comparison: Comparison, times: TimeToTarget) -> list[list[tuple[str, str]]]:
    """Return a main and a small line of text, for each row and batch size."""

    def lines(result: Reached | None) -> tuple[str, str]:
        if result is None:
            return "-", ""
        left_out = f"not counted: {', '.join(result.left_out)}" if result.left_out else ""
        median, count = result.median, len(result.seeds)
        if median is None:
            return "-", left_out
        seeds = f"{result.reached} of {plural(count, 'seed')}"
        if median != _NEVER:
            main = f"{median.steps:,.0f} steps"
            facts = f"{median.epochs:.3g} epochs, {median.images:,.0f} images, {median.seconds:.3g} s"
        else:
            main, facts = (seeds, "") if result.reached else ("never", plural(count, "seed"))
            seeds = ""
        return main, "; ".join(filter(None, [facts, seeds, left_out]))

    places = [[(row, batch) for batch in comparison.columns] for row in comparison.rows]
    return [[lines(times.cells.get(place)) for place in of_row] for of_row in places]
