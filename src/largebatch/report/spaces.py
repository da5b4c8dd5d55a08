"""Warn where the settings tried don't support the choice: undeclared or unequal search spaces, edges and gaps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from largebatch.report.cells import Cell
from largebatch.report.compare import Comparison
from largebatch.report.trials import apart, is_log, is_number
from largebatch.report.warn import Check, Warn, check_cells, names_of
from largebatch.report.wording import listed, plural, row_label, short

WIDEST_GAP = 4  # factor between neighbouring values of an option in log scale
_EDGE = 0.1  # part of a declared range
_MORE_DECADES = 0.5  # difference between search spaces
_NO_TUNING = ("epochs", "steps")  # longer training is no setting to tune
_WORDS = {"lr": "learning rate", "lmbda": "lambda", "weight_decay": "weight decay"}


class _Values(NamedTuple):
    """Numbers of one option in a cell, ascending; all are positive for an option in log scale, or 0."""

    tried: list[float]
    trained: list[float]  # with a finished run
    chosen: float
    declared: tuple[float, float] | None  # smallest and largest allowed value


def tuned_keys(cell: Cell) -> list[str]:
    """Return the keys whose values differ between the settings tried."""
    options = [setting.options for setting in cell.settings if setting.tried]
    keys = sorted({key for of_setting in options for key in of_setting}.difference(_NO_TUNING))
    return [key for key in keys if any(apart(key, options[0].get(key), other.get(key)) for other in options)]


def declared_space(cell: Cell) -> dict[str, list[Any]]:
    """Return the declared values of each key that all runs of the settings tried declare, over all of their spaces.

    A range of numbers is their list of two; ranges are joined.
    """
    spaces = [run.config.get("space") or {} for setting in cell.settings if setting.tried for run in setting.runs]
    found: dict[str, list[Any]] = {}
    for key in sorted(set.intersection(*map(set, spaces))) if spaces else []:
        values = [value for space in spaces for value in space[key]]
        numbers = all(map(is_number, values))
        found[key] = [min(values), max(values)] if numbers else list(dict.fromkeys(values))
    return found


def undeclared_keys(cell: Cell) -> list[str]:
    return sorted(set(tuned_keys(cell)) - declared_space(cell).keys())


def space_size(cell: Cell) -> tuple[int, float]:
    """Return the size of the declared search space: number of keys, and decades of all keys in log scale together."""
    space = declared_space(cell)
    ranges = [ends for key, ends in space.items() if is_log(key) and is_number(ends[0]) and ends[0] > 0]
    return len(space), sum(math.log10(high / low) for low, high in ranges)


def _values(cell: Cell, key: str) -> _Values | None:
    """Return the numbers of a tuned key. None if it has other values, or no run of the cell finished."""
    tried = [setting for setting in cell.settings if setting.tried]
    numbers = [setting.options.get(key) for setting in tried]
    if cell.chosen is None or not all(map(is_number, numbers)):
        return None
    ends = declared_space(cell).get(key)
    return _Values(
        sorted({setting.options[key] for setting in tried}),
        sorted({setting.options[key] for setting in tried if setting.finished}),
        cell.chosen.options[key],
        (ends[0], ends[1]) if ends and all(map(is_number, ends)) else None,
    )


def at_edge(cell: Cell, key: str) -> bool:
    """Return True if a better value of ``key`` may lie beyond the range that was searched.

    With a declared range: the chosen value lies in its outer tenth, or all values beyond the chosen one diverged.
    Without: the chosen value is the smallest or the largest that trained. Nothing lies below 0.
    """
    found = _values(cell, key)
    if found is None:
        return False
    tried, trained, chosen, declared = found
    lowest, highest = (not apart(key, chosen, trained[end]) for end in (0, -1))
    if declared is None:
        return (lowest and chosen != 0) or highest
    low, high = declared
    if is_log(key) and min(low, chosen) > 0:
        low, high, place = math.log(low), math.log(high), math.log(chosen)
    else:
        place = chosen
    part = (place - low) / (high - low)
    diverged_below = lowest and apart(key, chosen, tried[0])
    diverged_above = highest and apart(key, chosen, tried[-1])
    return (part < _EDGE and chosen != 0) or part > 1 - _EDGE or diverged_below or diverged_above


def beside_gap(cell: Cell, key: str) -> bool:
    """Return True if no value within a factor of 4 of the chosen one was tried on one side of it.

    The ends of a declared range count as tried.
    """
    found = _values(cell, key) if is_log(key) else None
    if found is None or found.chosen <= 0:
        return False
    points = sorted({value for value in (*found.tried, *(found.declared or ())) if value > 0})
    below = [value for value in points if value < found.chosen and apart(key, value, found.chosen)]
    above = [value for value in points if value > found.chosen and apart(key, value, found.chosen)]
    return (bool(below) and found.chosen > WIDEST_GAP * below[-1]) or (
        bool(above) and above[0] > WIDEST_GAP * found.chosen
    )


def _undeclared(comparison: Comparison) -> Iterator[Warn]:
    cells = [cell for cell in comparison.shown if undeclared_keys(cell)]
    if cells:
        keys = sorted({key for cell in cells for key in undeclared_keys(cell)})
        yield Warn(
            "Undeclared search space",
            f"For {names_of(comparison, cells)}, several values of {listed(keys)} were tried without a declared range. "
            "So the search of one optimizer may have been wider than that of another, or have followed its results. "
            "Declare the ranges before the search: space in the sweep file.",
        )


def _unequal_sizes(comparison: Comparison) -> Iterator[Warn]:
    said: dict[str, list[str]] = {}  # the spaces in words, and the batch sizes that have them
    for batch in comparison.columns:
        cells = [cell for cell in comparison.column(batch) if declared_space(cell) and not undeclared_keys(cell)]
        sizes = [space_size(cell) for cell in cells]
        decades = [size for _, size in sizes]
        if cells and (len({keys for keys, _ in sizes}) > 1 or max(decades) - min(decades) > _MORE_DECADES):
            words = [
                f"{row_label(cell.row)} {plural(keys, 'key')} over {size:.1f} decades"
                for cell, (keys, size) in zip(cells, sizes, strict=True)
            ]
            said.setdefault(listed(words), []).append(f"{batch:,}")
    if said:
        differ = "; ".join(f"at {listed(batches)} {words}" for words, batches in said.items())
        yield Warn(
            "Search spaces of different size",
            f"The optimizers' declared search spaces differ: {differ}. "
            "With equal trials, a larger space is searched less densely, and a narrow one around good values helps.",
        )


def _untuned(comparison: Comparison) -> Iterator[Warn]:
    cells = [
        cell
        for cell in comparison.shown
        if cell.trials == 1 and any(other.trials > 1 for other in comparison.column(cell.batch_size))
    ]
    if cells:
        yield Warn(
            "Untuned beside tuned optimizers",
            f"For {names_of(comparison, cells)}, a single setting was tried, but several for other optimizers at the "
            "same batch size. Such a comparison favours the tuned optimizers.",
        )


def _of_keys(comparison: Comparison) -> Iterator[Warn]:
    """Warn of edges and gaps, for each tuned key."""
    for key in sorted({key for cell in comparison.shown for key in tuned_keys(cell)}):
        for check in (_edge(key), _gap(key)):
            yield from check(comparison)


def _edge(key: str) -> Check:
    name = _WORDS.get(short(key), short(key))
    return check_cells(
        f"Best {name} at the edge of the range",
        f"For {{}}, the chosen {name} is at the edge of its range: the declared range, or else the values that "
        f"trained. A better {name} may lie beyond. Compare again with a wider range.",
        lambda cell: key in tuned_keys(cell) and at_edge(cell, key),
    )


def _gap(key: str) -> Check:
    name = _WORDS.get(short(key), short(key))
    return check_cells(
        f"Wide gap beside the best {name}",
        f"For {{}}, the chosen {name} and the next one tried differ by more than a factor of {WIDEST_GAP}. A better "
        f"{name} may lie between them. Compare again with more values.",
        lambda cell: key in tuned_keys(cell) and beside_gap(cell, key),
    )


CHECKS: tuple[Check, ...] = (_undeclared, _unequal_sizes, _untuned, _of_keys)
