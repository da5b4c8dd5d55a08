"""Estimate the best learning rate of a row at a batch size, with its standard error.

The logarithm of the validation error is roughly a parabola in the logarithm of the learning rate, near its minimum.
Weighted least squares fit the parabola. Its vertex is the best learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from largebatch.config.lr_scaling import LrScalingConfig
from largebatch.report.cells import BY_VALIDATION, Cell, Setting
from largebatch.report.load import Run
from largebatch.report.sensitivity import at_other_lrs
from largebatch.report.wording import plural, three_digits

CONFIDENCE = 0.9
Z = 1.6449  # standard errors on either side of an interval of this confidence
_NEAR = math.log(2)  # the parabola takes errors up to twice the smallest error
_FEWEST_DF = 4  # degrees of freedom; with fewer, the scatter over seeds doesn't tell the noise
# Standard error because a parabola is only an approximation, in steps of the grid. On quadratic losses, the vertex is
# within 0.35 steps of the true optimum. Beside a cliff there is no parabola, and the optimum is anywhere within
# a step of the best tried.
_FORM, _CLIFF = 0.25, CONFIDENCE / Z

Accuracy = Callable[[Run], float]


class Estimate(NamedTuple):
    """Estimate with a 90 % interval.

    Attributes:
        value: best estimate, infinite if the likelihood rises without end.
        low, high: limits. None: the data don't limit it on this side.
    """

    value: float
    low: float | None
    high: float | None

    @property
    def text(self) -> str:
        """Return ``"0.012 (0.008 to 0.02)"``, or only the limit on one side: ``"above 0.008"``."""
        if self.low is not None and self.high is not None:
            return f"{three_digits(self.value)} ({three_digits(self.low)} to {three_digits(self.high)})"
        if self.low:
            return f"above {three_digits(self.low)}"
        return f"below {three_digits(self.high)}" if self.high else "unknown"

    def record(self) -> dict[str, float | None]:
        """Return the fields for JSON, with None for an infinite value."""
        return {name: None if value == math.inf else value for name, value in self._asdict().items()}


@dataclass(frozen=True)
class Best:
    """Best learning rate at a batch size.

    Attributes:
        tried: number of learning rates tried, with all other options of the chosen setting.
        log: logarithm of the best learning rate. None: the data don't determine it.
        deviation: standard error of ``log``.
        reason: sentence that tells why ``log`` is None.
    """

    batch_size: int
    tried: int
    log: float | None = None
    deviation: float = 0.0
    reason: str = ""

    @property
    def lr(self) -> Estimate | None:
        if self.log is None:
            return None
        return Estimate(*(math.exp(self.log + sign * Z * self.deviation) for sign in (0, -1, 1)))


@dataclass(frozen=True)
class _Tried:
    """One learning rate of a cell.

    Attributes:
        log: logarithm of the learning rate after scaling.
        error: logarithm of the mean error over seeds.
        images: held-out images of all seeds.
        by_seed: logarithm of the error, by seed.
    """

    log: float
    error: float
    images: float
    by_seed: dict[int, float]


def chosen_accuracy(cell: Cell) -> Accuracy:
    """Return the accuracy by which the report chooses: on validation images if all runs have them. Diverged: 0."""
    return lambda run: (run.metric(cell.chosen_by) or 0.0) if run.state == "finished" else 0.0


def seed_noise(cells: Iterable[Cell], accuracy: Callable[[Cell], Accuracy]) -> float | None:
    """Return the standard deviation of a run's log error over seeds, without the part that all learning rates share.

    None: fewer than 4 degrees of freedom. Only learning rates near the best count, because others scatter more.
    """
    squares, freedom = 0.0, 0
    for cell in cells:
        tried = _tried(cell, accuracy(cell))
        least = min((one.error for one in tried), default=0.0)
        near = [one for one in tried if one.error <= least + _NEAR]
        seeds = sorted(set.intersection(*(set(one.by_seed) for one in near))) if near else []
        if len(near) < 2 or len(seeds) < 2:
            continue
        table = np.array([[one.by_seed[seed] for seed in seeds] for one in near])
        table = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
        squares += float((table**2).sum())
        freedom += (len(near) - 1) * (len(seeds) - 1)
    return math.sqrt(squares / freedom) if freedom >= _FEWEST_DF else None


def best_lr(cell: Cell, accuracy: Accuracy, noise: float | None) -> Best:
    """Fit a parabola to the log error over the log learning rate.

    If a neighbour of the best learning rate tried has more than twice its error, the best tried is the estimate.

    Args:
        noise: standard deviation of a run's log error. None: that of independent held-out images.
    """
    tried = _tried(cell, accuracy)
    size, count = cell.batch_size, len(tried)
    if cell.chosen is None:
        return Best(size, count, reason="no run finished")
    if count < 3:
        return Best(size, count, reason=f"only {plural(count, 'learning rate')} tried; a parabola needs 3")
    x, y = np.array([one.log for one in tried]), np.array([one.error for one in tried])
    best = int(y.argmin())
    if best in (0, count - 1):
        direction = "lowest is best: try lower ones" if best == 0 else "highest is best: try higher ones"
        return Best(size, count, reason=f"at the edge: of the learning rates tried, the {direction}")
    log, step = float(x[best]), float(x[best + 1] - x[best - 1]) / 2
    near = y <= y[best] + _NEAR
    if not (near[best - 1] and near[best + 1]):
        return Best(size, count, log, step * _CLIFF)
    first, last = _around(near, best)
    used = slice(first, last + 1)
    deviations = np.array([_deviation(one, noise) for one in tried[used]])
    vertex, curvature_z, deviation = _vertex(x[used] - log, y[used], deviations)
    if curvature_z < Z:
        return Best(size, count, reason="flat: the parabola's curvature is within its error")
    log += vertex
    if not x[0] <= log <= x[-1]:
        return Best(size, count, reason="at the edge: the parabola's minimum is outside of the learning rates tried")
    return Best(size, count, log, math.hypot(deviation, step * _FORM))


def _vertex(x: np.ndarray, y: np.ndarray, deviations: np.ndarray) -> tuple[float, float, float]:
    """Return the minimum of the parabola, its curvature in standard errors, and the minimum's standard error.

    Standard errors grow if the parabola misses the points by more than ``deviations``.
    """
    design = np.stack([x**2, x, np.ones_like(x)], axis=1) / deviations[:, None]
    target = y / deviations
    coefficients, *_ = np.linalg.lstsq(design, target, rcond=None)
    freedom = len(x) - 3
    misfit = float(((target - design @ coefficients) ** 2).sum()) / freedom if freedom else 1.0
    covariance = np.linalg.inv(design.T @ design) * max(misfit, 1.0)
    a, b = float(coefficients[0]), float(coefficients[1])
    if a <= 0:
        return 0.0, 0.0, math.inf
    gradient = np.array([b / (2 * a**2), -1 / (2 * a), 0.0])
    return -b / (2 * a), a / math.sqrt(covariance[0, 0]), math.sqrt(float(gradient @ covariance @ gradient))


def _around(near: np.ndarray, best: int) -> tuple[int, int]:
    """Return the first and the last index of the unbroken range of ``near`` that holds ``best``."""
    first = last = best
    while first > 0 and near[first - 1]:
        first -= 1
    while last < len(near) - 1 and near[last + 1]:
        last += 1
    return first, last


def _deviation(one: _Tried, noise: float | None) -> float:
    """Return the standard error of a mean log error.

    Without ``noise``, the error rate p of n images is binomial: its relative variance is (1 - p) / (p n).
    """
    if noise is not None:
        return max(noise, 1e-6) / math.sqrt(len(one.by_seed))
    p = math.exp(one.error)
    return max(math.sqrt((1 - p) / (p * one.images)), 1e-6)


def _tried(cell: Cell, accuracy: Accuracy) -> list[_Tried]:
    """Return the learning rates tried with all other options of the chosen setting, ascending."""
    found = []
    for setting in at_other_lrs(cell):
        runs = [*setting.finished, *setting.diverged]
        errors = [1 - accuracy(run) for run in runs]
        images = _images(cell, runs)
        logs = {run.seed: math.log(_smooth(error, images)) for run, error in zip(runs, errors, strict=True)}
        total = images * len(runs)
        found.append(_Tried(_log_lr(setting), math.log(_smooth(sum(errors) / len(runs), total)), total, logs))
    return sorted(found, key=lambda one: one.log)


def _smooth(error: float, images: float) -> float:
    """Return an error rate above 0: half an image counts as wrong in addition."""
    return (error * images + 0.5) / (images + 0.5)


def _images(cell: Cell, runs: Sequence[Run]) -> float:
    name = "val_images" if cell.chosen_by == BY_VALIDATION else "test_images"
    return max((run.metric(name) or 0.0 for run in runs), default=0.0) or 1e6


def _log_lr(setting: Setting) -> float:
    config = [*setting.finished, *setting.diverged][0].config
    scaling = LrScalingConfig(**config.get("lr_scaling") or {})
    return math.log(scaling.scaled(config["optimizer"]["lr"], config["batch_size"]))
