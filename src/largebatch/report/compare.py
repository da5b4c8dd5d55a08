"""Compare runs: group them by data set, model and mode, and lay them out by optimizer and batch size.

All functions are pure. The page and docs/report.md explain the rules to readers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from largebatch.config.datasets import ImageFolder, dataset_kind
from largebatch.config.optimizer_libraries import structure
from largebatch.config.optimizers import OPTIMIZERS
from largebatch.config.schedules import SCHEDULES
from largebatch.report.cells import Cell, Place, RowKey, choose, settings_of
from largebatch.report.load import Run
from largebatch.report.verdict import Verdict, verdicts


@dataclass(frozen=True)
class Comparison:
    """All runs of one data set, model and mode."""

    dataset: str
    model: str
    mode: str
    rows: tuple[RowKey, ...]
    columns: tuple[int, ...]  # batch sizes, ascending
    cells: dict[Place, Cell]  # in the order of rows, then columns
    verdicts: tuple[Verdict, ...]  # one for each column
    runs: list[Run]

    def row(self, row: RowKey) -> list[Cell]:
        return [cell for cell in self.cells.values() if cell.row == row]

    def column(self, batch_size: int) -> list[Cell]:
        return [cell for cell in self.cells.values() if cell.batch_size == batch_size]

    @property
    def shown(self) -> list[Cell]:
        """Cells that have something to draw."""
        return [cell for cell in self.cells.values() if cell.drawn]

    @property
    def finished(self) -> list[Cell]:
        return [cell for cell in self.cells.values() if cell.mean is not None]

    @property
    def confirmed(self) -> bool:
        """True if at least one cell is confirmed."""
        return any(cell.confirmed for cell in self.cells.values())

    @property
    def bold(self) -> list[Cell]:
        """Cells that are ahead of all others in their column."""
        return [verdict.leader for verdict in self.verdicts if verdict.leader]


def compare(runs: Iterable[Run], by: Sequence[str] = ()) -> list[Comparison]:
    """Return one comparison for each data set, model and mode.

    Runs on different data under one name, such as a folder that has got more images, have a comparison each, with the
    digest of their data in its name. So have runs from another run's checkpoint (``start_from``).

    Args:
        by: dotted configuration keys. Each of their values gets its own row, as optimizers and schedules do.
    """
    groups: dict[tuple[str, str, str], list[Run]] = {}
    runs = list(runs)
    digests: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        digests[_dataset(run)] |= {run.data} - {""}
    for run in runs:
        name = _dataset(run)
        if len(digests[name]) > 1:
            name += f" (data {run.data or 'unknown'})"
        if run.config.get("start_from"):
            name += f", from {run.config['start_from']}"
        groups.setdefault((name, run.config["model"]["name"], run.config["mode"]["name"]), []).append(run)
    return [_comparison(key, groups[key], by) for key in sorted(groups)]


def _dataset(run: Run) -> str:
    dataset = run.config["dataset"]
    kind = dataset_kind(dataset)
    in_root = kind is not None and issubclass(kind, ImageFolder)
    return f"{dataset['name']} {dataset.get('root')}" if in_root else str(dataset["name"])


def _comparison(key: tuple[str, str, str], runs: list[Run], by: Sequence[str]) -> Comparison:
    tried: dict[Place, list[Run]] = {}
    for row, of_row in _rows(runs, by).items():
        for run in of_row:
            tried.setdefault((row, run.config["batch_size"]), []).append(run)
    rows = tuple(sorted({row for row, _ in tried}, key=_row_order))
    columns = tuple(sorted({batch for _, batch in tried}))
    places = [(row, batch) for row in rows for batch in columns if (row, batch) in tried]
    cells = {place: choose(*place, settings_of(tried[place])) for place in places}
    by_column = [(batch, [cell for cell in cells.values() if cell.batch_size == batch]) for batch in columns]
    return Comparison(*key, rows, columns, cells, tuple(verdicts(by_column)), runs)


def _rows(runs: Iterable[Run], by: Sequence[str]) -> dict[RowKey, list[Run]]:
    """Group runs by optimizer, schedule, the structural options that differ between them, and the ``by`` keys.

    So are the shapes of ``batch_schedule``: a growing batch is no setting of a constant one.
    """
    named: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        named[run.config["optimizer"]["name"], run.config["schedule"]["name"]].append(run)
    rows: dict[RowKey, list[Run]] = defaultdict(list)
    for (optimizer, schedule), of_name in named.items():
        structures = [structure(run.config["optimizer"]) for run in of_name]
        keys = sorted({f"optimizer.{key}" for one in structures for key in one} - {*by})
        different = [key for key in keys if len({one.get(key.removeprefix("optimizer.")) for one in structures}) > 1]
        shapes = {_batch_schedule(run) for run in of_name}
        for run, one in zip(of_name, structures, strict=True):
            extra = [(key, one.get(key.removeprefix("optimizer."), "none")) for key in different]
            extra += [("batch_schedule", _batch_schedule(run))] if len(shapes) > 1 else []
            extra += [(key, _text(run.given.get(key, "none"))) for key in by]
            rows[RowKey(optimizer, schedule, tuple(extra))].append(run)
    return rows


def _batch_schedule(run: Run) -> str:
    return str(run.given.get("batch_schedule.shape", "constant"))


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _row_order(row: RowKey) -> tuple[Any, ...]:
    """Sort key: known optimizers first, in the order of ``OPTIMIZERS``; no warm-up before warm-up; numbers by size."""
    optimizer = (*OPTIMIZERS, row.optimizer).index(row.optimizer)
    schedule = (*SCHEDULES, row.schedule).index(row.schedule)
    return optimizer, schedule, [(_number(value), value) for _, value in row.extra], row


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.inf
