"""Verdict on each column of a comparison: which optimizer is ahead, which aren't told apart, how certain that is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from largebatch.report.cells import Cell, RowKey
from largebatch.report.inference import LEVEL, Pair, compared, decide
from largebatch.runs.correct import Bits


@dataclass(frozen=True)
class Difference:
    """A pair of cells, and the corrected p-value of its test.

    Attributes:
        p: None without a test, because seeds are missing.
        ahead: True if ``first`` is ahead of ``second``.
    """

    first: Cell
    second: Cell
    pair: Pair[RowKey]
    p: float | None
    ahead: bool


@dataclass(frozen=True)
class Verdict:
    """Result of a column.

    Attributes:
        ranked: cells with a result, by mean, the highest first.
        differences: pairs of these cells with common seeds, in the order of ``ranked``.
        leader: the cell that is ahead of all others, or None.
        p: corrected p-value of the test for a leader.
        level: level at which a difference is significant after Bonferroni's correction for the number of columns.
        images: True if the choice of test images is part of the variance of every difference.
    """

    batch_size: int
    ranked: tuple[Cell, ...]
    differences: tuple[Difference, ...]
    leader: Cell | None
    p: float
    level: float
    images: bool

    @property
    def best(self) -> Cell | None:
        return self.ranked[0] if self.ranked else None

    def between(self, first: Cell, second: Cell) -> Difference | None:
        """Return the difference between two cells; None without common seeds."""
        return next((d for d in self.differences if {d.first.row, d.second.row} == {first.row, second.row}), None)


def verdicts(columns: Sequence[tuple[int, Sequence[Cell]]]) -> list[Verdict]:
    """Return the verdict on each column, from its batch size and its cells.

    A cell with a seed that diverged or didn't finish is never ahead, because its mean leaves that seed out. Nor is an
    unconfirmed cell in a column with confirmed cells.
    """
    ranked = [sorted((c for c in cells if c.mean is not None), key=lambda c: -(c.mean or 0)) for _, cells in columns]
    runs = [run for cells in ranked for cell in cells for run in cell.drawn]
    test_images = max((run.metric("test_images") or 0.0 for run in runs), default=0.0)
    variances = {
        (column, first.row, second.row): image_variance(*_correct(first, second))
        for column, cells in enumerate(ranked)
        for first, second in itertools.combinations(cells, 2)
    }
    known = {place: variance for place, variance in variances.items() if variance is not None}
    pairs = compared(
        [{cell.row: cell.accuracies for cell in cells} for cells in ranked],
        known,
        resolution=1 / test_images if test_images else 0.0,
    )
    incomplete = {
        (column, cell.row)
        for column, cells in enumerate(ranked)
        for cell in cells
        if not cell.complete or (not cell.confirmed and any(other.confirmed for other in cells))
    }
    trials = {(column, cell.row): cell.choices for column, cells in enumerate(ranked) for cell in cells}
    decisions = decide([[cell.row for cell in cells] for cells in ranked], pairs, incomplete, trials)
    level = LEVEL / max(sum(len(cells) > 1 for cells in ranked), 1)
    found = []
    for column, (batch_size, _) in enumerate(columns):
        cells, decision = {cell.row: cell for cell in ranked[column]}, decisions[column]
        differences = [
            Difference(
                cells[pair.first], cells[pair.second], pair,
                decision.pair_p.get((pair.first, pair.second)), (pair.first, pair.second) in decision.ahead,
            )
            for pair in pairs[column]
        ]  # fmt: skip
        leader = cells[decision.leader] if decision.leader else None
        images = all((column, a, b) in known for a, b in itertools.combinations(cells, 2))
        found.append(
            Verdict(batch_size, tuple(cells.values()), tuple(differences), leader, decision.leader_p, level, images)
        )
    return found


def _correct(first: Cell, second: Cell) -> tuple[list[Bits | None], list[Bits | None]]:
    """Return the correct test images of both cells at their common seeds."""
    of_first, of_second = (
        {run.seed: run.correct_images(cell.metric) for run in cell.drawn} for cell in (first, second)
    )
    common = sorted(of_first.keys() & of_second.keys())
    return [of_first[seed] for seed in common], [of_second[seed] for seed in common]


def image_variance(first: Sequence[Bits | None], second: Sequence[Bits | None]) -> float | None:
    """Return the variance of the difference in accuracy that comes from the choice of the test images.

    With d_si the difference at seed s and image i, in -1..1, the variance over N images of the mean over n seeds is
    ``var_i(mean_s d_si) / N``. It contains noise of single seeds and images, which the variance over seeds has already:
    ``var(residual) / (n * N)`` is subtracted.

    Args:
        first: correct images at each seed, bool [N].
        second: the same of the other cell.

    Returns:
        None if the images of a run are unknown, or of another number.
    """
    known = [bits for bits in (*first, *second) if bits is not None]
    if not first or len(known) < 2 * len(first) or len({len(bits) for bits in known}) > 1:
        return None
    differences = np.array(known[: len(first)], np.float32) - np.array(known[len(first) :], np.float32)
    seeds, images = differences.shape
    of_image = differences.mean(axis=0)
    residual = differences - of_image - differences.mean(axis=1, keepdims=True) + differences.mean()
    noise = float((residual**2).sum()) / max((seeds - 1) * (images - 1), 1)
    return float(max(of_image.var(ddof=1) - noise / seeds, 0.0)) / float(images)
