"""A warning, and the names of the cells that it concerns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from largebatch.report.cells import Cell, RowKey
from largebatch.report.compare import Comparison
from largebatch.report.wording import batches, listed, row_label


class Warn(NamedTuple):
    """A problem's short name, and its meaning for the reader."""

    title: str
    text: str


Check = Callable[[Comparison], Iterator[Warn]]


def check_cells(title: str, text: str, test: Callable[[Cell], bool]) -> Check:
    """Return a check that warns about the cells that pass ``test``. ``text`` has ``{}`` for their names."""

    def check(comparison: Comparison) -> Iterator[Warn]:
        found = [cell for cell in comparison.shown if test(cell)]
        if found:
            yield Warn(title, text.format(names_of(comparison, found)))

    return check


def names_of(comparison: Comparison, cells: Iterable[Cell]) -> str:
    """Return ``"LARS at 64 and 128, TVLARS"``. A row without sizes stands for all of its batch sizes with a result."""

    def by_row(cells: Iterable[Cell]) -> dict[RowKey, list[int]]:
        found: dict[RowKey, list[int]] = defaultdict(list)
        for cell in cells:
            found[cell.row].append(cell.batch_size)
        return found

    named, finished = by_row(cells), by_row(comparison.finished)
    if named == finished and len(named) > 1:
        return "every optimizer at every batch size"
    return listed([
        row_label(row) + ("" if sizes == finished.get(row) else f" at {batches(sizes)}") for row, sizes in named.items()
    ])  # fmt: skip
