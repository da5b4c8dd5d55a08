"""Comparison of branches of one checkpoint (``start_from``) at several batch sizes, after equal images.

The branching method of Merrill et al. (arXiv 2505.23971): the largest batch size whose loss isn't above that of smaller
ones loses no images. Unlike the hyperbola it fits no law, and needs no target.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from scipy.stats import t as student

from largebatch.report.best_lr import Estimate
from largebatch.report.cells import Cell, finished
from largebatch.report.wording import plural
from largebatch.runs.table import plain_table

TOLERANCE = 0.01  # part of the loss that counts as equal
_FEWEST_SEEDS = 3
_UNEQUAL = 0.02  # relative difference of the images of branches


class Branches(NamedTuple):
    """Branches at one batch size, after all their images.

    Attributes:
        loss: mean over seeds.
        above: relative difference to the smaller batch size with the lowest loss, paired by seed. None at the smallest.
        parted: True if the loss is above by more than ``TOLERANCE``, False if not, None if the seeds can't tell.
    """

    batch_size: int
    loss: float
    seeds: int
    above: Estimate | None
    parted: bool | None


class Parting(NamedTuple):
    """Branches of one row, and in one sentence where their loss parts."""

    metric: str
    branches: list[Branches]
    words: str

    @property
    def text(self) -> str:
        lines = []
        for one in self.branches:
            state = {None: "can't tell", True: "yes", False: "no"}[one.parted] if one.above else ""
            lines.append([f"{one.batch_size:,}", f"{one.loss:.4f}", _percent(one.above), state, str(one.seeds)])
        words = f"{self.words[0].upper()}{self.words[1:]}."
        if not lines:
            return words
        return plain_table(["batch", self.metric, "above the best smaller", "parted", "seeds"], lines) + f"\n{words}"

    def record(self) -> dict[str, Any]:
        branches = [one._asdict() | {"above": one.above and one.above.record()} for one in self.branches]
        return {"metric": self.metric, "branches": branches, "words": self.words}


def parting(cells: Sequence[Cell]) -> Parting | None:
    """Return the comparison of a row's branches, by validation loss if there is one. None: fewer than two batch sizes.

    The interval of a difference is Student's, over at least three common seeds.
    """
    cells = [cell for cell in cells if finished(cell.reported)]
    runs = [run for cell in cells for run in finished(cell.reported)]
    if len(cells) < 2:
        return None
    metric = "val/loss" if all(run.metric("val/loss") is not None for run in runs) else "test/loss"
    images = [run.metric("training_examples") or 0.0 for run in runs]
    if max(images) > (1 + _UNEQUAL) * min(images):
        words = f"the branches saw {min(images):,.0f} to {max(images):,.0f} images; only equal numbers can be compared"
        return Parting(metric, [], words)
    losses = [{run.seed: run.metric(metric) or 0.0 for run in finished(cell.reported)} for cell in cells]
    if not all(all(of_cell.values()) for of_cell in losses):
        return Parting(metric, [], "a branch has no loss, or a loss of 0; only losses above 0 can be compared")
    branches: list[Branches] = []
    lowest = 0  # the batch size with the lowest loss so far
    for at, (cell, of_cell) in enumerate(zip(cells, losses, strict=True)):
        one = _branches(cell.batch_size, of_cell, losses[lowest])
        branches.append(one if at else one._replace(above=None, parted=None))
        lowest = at if one.loss < branches[lowest].loss else lowest
    return Parting(metric, branches, _words(branches))


def _branches(batch_size: int, losses: dict[int, float], best: dict[int, float]) -> Branches:
    mean = statistics.fmean(losses.values())
    differences = [losses[seed] / best[seed] - 1 for seed in losses.keys() & best.keys()]
    count = len(differences)
    if count < _FEWEST_SEEDS:
        return Branches(
            batch_size, mean, len(losses), Estimate(mean / statistics.fmean(best.values()) - 1, None, None), None
        )
    middle = statistics.fmean(differences)
    half = float(student.ppf(0.95, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    parted = True if middle - half > TOLERANCE else False if middle + half <= TOLERANCE else None
    return Branches(batch_size, mean, len(losses), Estimate(middle, middle - half, middle + half), parted)


def _words(branches: Sequence[Branches]) -> str:
    first, *others = branches
    if all(one.above and one.above.low is None for one in others):
        return f"fewer than {plural(_FEWEST_SEEDS, 'common seed')} can't tell where the loss parts"
    equal = first.batch_size
    for one in others:
        if one.parted is not False:
            break
        equal = one.batch_size
    if equal == others[-1].batch_size:
        return f"the loss parts at none of the batch sizes tried: up to {equal:,}, no images are lost"
    start = f"up to a batch size of {equal:,}, no images are lost; " if equal > first.batch_size else ""
    parted = next((one.batch_size for one in others if one.parted), None)
    if parted is None:
        return f"{start}beyond {equal:,}, these seeds can't tell where the loss parts"
    return f"{start}from {parted:,} on, equal images give a higher loss"


def _percent(above: Estimate | None) -> str:
    if above is None:
        return ""
    if above.low is None or above.high is None:
        return f"{above.value:+.1%}"
    return f"{above.value:+.1%} ({above.low:+.1%} to {above.high:+.1%})"
