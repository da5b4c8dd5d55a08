"""Measure the sensitivity to the learning rate: the accuracy lost with a learning rate beside the chosen one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from largebatch.report.cells import BY_VALIDATION, Cell, Setting
from largebatch.report.compare import Comparison
from largebatch.report.wording import decimals

_LR = "optimizer.lr"


def sensitivity_note(comparison: Comparison) -> str:
    by_validation = all(cell.chosen_by == BY_VALIDATION for cell in comparison.cells.values() if cell.chosen)
    return (
        f"Points of {'best validation' if by_validation else 'test'} accuracy lost if the learning rate is off from "
        "the chosen one by a factor of 2 and of 4, in the worse direction. Between the learning rates tried, the "
        "accuracy is interpolated over the logarithm of the learning rate, with all other options as chosen. A "
        "diverged seed counts as 0. ≥: only one direction was tried. -: fewer than two learning rates."
    )


def sensitivity_table(comparison: Comparison) -> list[list[tuple[str, str]]]:
    """Return two lines of text for each row and batch size. Empty if no cell has several learning rates."""
    digits = decimals(comparison)

    def lines(cell: Cell | None) -> tuple[str, str]:
        if cell is None or not cell.chosen or len(_learning_rates(cell)) < 2:
            return "-", ""
        twofold, fourfold = (f"factor {factor}: {_text(lost(cell, factor), digits)}" for factor in (2, 4))
        return twofold, fourfold

    if all(len(_learning_rates(cell)) < 2 for cell in comparison.cells.values() if cell.chosen):
        return []
    return [[lines(comparison.cells.get((row, batch))) for batch in comparison.columns] for row in comparison.rows]


def lost(cell: Cell, factor: float) -> list[float | None]:
    """Return the accuracy lost at the chosen learning rate / ``factor``, and at the chosen one * ``factor``.

    Accuracies are the scores that chose the setting, in 0..1. None: the learning rates tried don't reach that far.
    """
    chosen = cell.chosen
    if chosen is None or chosen.options[_LR] <= 0:
        return [None, None]
    points = [(math.log(setting.options[_LR]), setting.score(cell.chosen_by)) for setting in at_other_lrs(cell)]
    middle = math.log(chosen.options[_LR])
    found = [_interpolated(points, middle + sign * math.log(factor)) for sign in (-1, 1)]
    return [None if score is None else chosen.score(cell.chosen_by) - score for score in found]


def at_other_lrs(cell: Cell) -> list[Setting]:
    """Return the chosen setting and the tried settings that differ from it only in learning rate, which is above 0."""
    if cell.chosen is None:
        return []
    others = {key: value for key, value in cell.chosen.options.items() if key != _LR}
    return [
        setting
        for setting in cell.settings  # by learning rate
        if setting.tried and setting.options[_LR] > 0 and setting.options == others | {_LR: setting.options[_LR]}
    ]


def _interpolated(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """Return the value at ``x`` on the lines between ``points``, which are ordered by x. None outside of them."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 - 1e-9 <= x <= x1 + 1e-9:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def _learning_rates(cell: Cell) -> set[float]:
    return {setting.options[_LR] for setting in cell.settings if setting.tried}


def _text(losses: Sequence[float | None], digits: int) -> str:
    known = [loss for loss in losses if loss is not None]
    if not known:
        return "not tried"
    return f"{'≥ ' if len(known) < len(losses) else ''}{100 * max(known):.{digits}f}"
