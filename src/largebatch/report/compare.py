"""From runs to the comparison: settings, the one of each cell that validation chose, and who leads a column.

Pure functions of what was loaded; the rules in words are in docs/report.md and, for readers, on the page itself.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from largebatch.report.load import Run

BY_VALIDATION = "best/val/accuracy"
BY_TEST = "test/accuracy"
# What is reported of the setting that was chosen by the former: at the epoch that validation chose, or at the end.
REPORTED = {BY_VALIDATION: "best/test/accuracy", BY_TEST: "test/accuracy"}

# Optimizers and schedules in the order of rows.
OPTIMIZERS = ("lars", "lamb", "tvlars", "clars", "sgd", "adamw", "adam", "adagrad", "rmsprop")
SCHEDULES = ("constant", "cosine", "warmup_cosine", "warmup_poly")


@dataclass(frozen=True, order=True)
class RowKey:
    """What tells rows apart: optimizer, schedule (with warm-up or without), and keys that the user asked for."""

    optimizer: str
    schedule: str
    extra: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but their seed."""

    options: dict[str, Any]
    runs: tuple[Run, ...]  # by seed

    @cached_property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.state == "finished"]

    @cached_property
    def diverged(self) -> list[Run]:
        return [run for run in self.runs if run.state == "diverged"]

    @property
    def tried(self) -> bool:
        """Whether it counts as a trial: one seed at least has an outcome."""
        return bool(self.finished or self.diverged)

    def values(self, figure: str) -> list[float]:
        """``figure`` of the finished runs, by seed."""
        found = (run.figure(figure) for run in self.finished)
        return [value for value in found if value is not None]

    def score(self, figure: str) -> float:
        """What settings are compared by: the mean over seeds, where one that diverged counts as 0."""
        return sum(self.values(figure)) / len(self.finished + self.diverged)


@dataclass(frozen=True)
class Cell:
    """One row at one batch size: the settings tried, and the chosen one's figures.

    Attributes:
        chosen: None where no run of any setting has finished.
        chosen_by: ``BY_VALIDATION``, or ``BY_TEST`` where not all settings have a validation part.
        mean: of the reported test accuracy over the chosen setting's finished seeds, in 0..1.
        spread: its sample standard deviation (divided by n - 1); None with fewer than two seeds.
    """

    row: RowKey
    batch_size: int
    settings: tuple[Setting, ...]
    chosen: Setting | None
    chosen_by: str
    mean: float | None
    spread: float | None

    @property
    def trials(self) -> int:
        return sum(setting.tried for setting in self.settings)

    @property
    def seeds(self) -> int:
        """Of the chosen setting, those that finished."""
        return len(self.chosen.finished) if self.chosen else 0

    @property
    def diverged(self) -> int:
        """Runs of any setting."""
        return sum(len(setting.diverged) for setting in self.settings)

    @property
    def shown(self) -> Setting | None:
        """The setting that curves are drawn of: the chosen one, or one that diverged where all did."""
        return self.chosen or next((setting for setting in self.settings if setting.tried), None)


@dataclass(frozen=True)
class Lead:
    """How a column ends.

    Attributes:
        best: the cell with the highest mean; None where nothing has finished.
        runner_up: the next one.
        clear: whether ``best`` leads by more than the spread, and is bold.
    """

    batch_size: int
    best: Cell | None
    runner_up: Cell | None
    clear: bool


@dataclass(frozen=True)
class Comparison:
    """All runs of one data set, model and mode."""

    dataset: str
    model: str
    mode: str
    rows: tuple[RowKey, ...]
    columns: tuple[int, ...]  # batch sizes, ascending
    cells: dict[tuple[RowKey, int], Cell]
    leads: tuple[Lead, ...]  # one a column
    runs: tuple[Run, ...]

    def column(self, batch_size: int) -> list[Cell]:
        return [self.cells[row, batch_size] for row in self.rows if (row, batch_size) in self.cells]

    @property
    def shown(self) -> list[Cell]:
        """The cells of which there is something to draw, by row and column."""
        cells = (self.cells.get((row, batch)) for row in self.rows for batch in self.columns)
        return [cell for cell in cells if cell is not None and cell.shown]


def compare(runs: Iterable[Run], by: Sequence[str] = ()) -> list[Comparison]:
    """A comparison for each data set, model and mode.

    Args:
        by: dotted keys of the configuration, beside optimizer and schedule, that make rows of their own.
    """
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((dataset_of(run), run.config["model"]["name"], run.config["mode"]["name"]), []).append(run)
    return [_comparison(key, groups[key], by) for key in sorted(groups)]


def dataset_of(run: Run) -> str:
    dataset = run.config["dataset"]
    return f"{dataset['name']} {dataset.get('root')}" if dataset["name"] == "imagefolder" else str(dataset["name"])


def _comparison(key: tuple[str, str, str], runs: list[Run], by: Sequence[str]) -> Comparison:
    tried: dict[tuple[RowKey, int], list[Run]] = {}
    for run in runs:
        tried.setdefault((row_of(run, by), run.config["batch_size"]), []).append(run)
    cells = {place: cell(*place, settings_of(of_cell)) for place, of_cell in tried.items()}
    rows = tuple(sorted({row for row, _ in cells}, key=row_order))
    columns = tuple(sorted({batch for _, batch in cells}))
    leads = tuple(lead(batch, [cells[row, batch] for row in rows if (row, batch) in cells]) for batch in columns)
    dataset, model, mode = key
    return Comparison(dataset, model, mode, rows, columns, cells, leads, tuple(runs))


def row_of(run: Run, by: Sequence[str] = ()) -> RowKey:
    extra = tuple((key, str(run.given.get(key, "none"))) for key in by)
    return RowKey(run.config["optimizer"]["name"], run.config["schedule"]["name"], extra)


def row_order(row: RowKey) -> tuple[int, int, RowKey]:
    """Known optimizers first, in the papers' order; without warm-up before with."""

    def place(name: str, known: tuple[str, ...]) -> int:
        return known.index(name) if name in known else len(known)

    return place(row.optimizer, OPTIMIZERS), place(row.schedule, SCHEDULES), row


def settings_of(runs: Iterable[Run]) -> tuple[Setting, ...]:
    """Runs by all that can change their result but the seed, ordered by learning rate, then by the other options."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        options = {key: value for key, value in run.options.items() if key != "seed"}
        groups.setdefault(json.dumps(options, sort_keys=True, default=str), []).append(run)
    found = []
    for of_setting in groups.values():
        of_setting.sort(key=lambda run: run.config["seed"])
        options = {key: value for key, value in of_setting[0].options.items() if key != "seed"}
        found.append(Setting(options, tuple(of_setting)))
    return tuple(sorted(found, key=lambda s: (s.options["optimizer.lr"], json.dumps(s.options, default=str))))


def cell(row: RowKey, batch_size: int, settings: tuple[Setting, ...]) -> Cell:
    """Choose among ``settings``.

    The one with the highest mean over seeds of the best validation accuracy is chosen; a seed that diverged counts as
    0, and of equal settings the one with more seeds is taken, then the one that comes first. The test set chooses only
    where a setting has no validation figures.
    """
    candidates = [setting for setting in settings if setting.finished]
    validated = all(len(setting.values(BY_VALIDATION)) == len(setting.finished) for setting in candidates)
    validated = validated and all(_chose_by_validation(run) for setting in candidates for run in setting.finished)
    chosen_by = BY_VALIDATION if validated and candidates else BY_TEST
    chosen = max(candidates, key=lambda s: (s.score(chosen_by), len(s.finished)), default=None)
    values = chosen.values(REPORTED[chosen_by]) if chosen else []
    return Cell(
        row, batch_size, settings, chosen, chosen_by,
        mean=statistics.fmean(values) if values else None,
        spread=statistics.stdev(values) if len(values) > 1 else None,
    )  # fmt: skip


def _chose_by_validation(run: Run) -> bool:
    return run.summary.get("best/chosen_by") == "val/accuracy" and run.figure("best/test/accuracy") is not None


def lead(batch_size: int, cells: Sequence[Cell]) -> Lead:
    """Who leads a column, and whether by more than the spread.

    The best mean leads clearly where its range mean ± spread lies above the range of every other cell: so each of them
    needs two seeds or more, and there must be another that finished. A cell whose chosen setting diverged on a seed
    never leads clearly, for its mean is over the seeds that went well.
    """
    finished = sorted((cell for cell in cells if cell.mean is not None), key=lambda cell: -_mean(cell))
    if not finished:
        return Lead(batch_size, None, None, clear=False)
    best, others = finished[0], finished[1:]
    clear = (
        bool(others)
        and best.chosen is not None
        and not best.chosen.diverged
        and all(_above(best, other) for other in others)
    )
    return Lead(batch_size, best, others[0] if others else None, clear)


def _above(cell: Cell, other: Cell) -> bool:
    if cell.spread is None or other.spread is None:
        return False
    gap = (_mean(cell) - cell.spread) - (_mean(other) + other.spread)
    return gap > 1e-9  # ranges that touch don't leave a gap, whatever rounding makes of it


def _mean(cell: Cell) -> float:
    return -math.inf if cell.mean is None else cell.mean


def differing(runs: Iterable[Run]) -> dict[str, list[Any]]:
    """Keys of the configuration that aren't the same for all runs, each with its values; None where it isn't set."""
    options = [run.options for run in runs]
    keys = sorted({key for of_run in options for key in of_run})
    values = {key: sorted({of_run.get(key) for of_run in options}, key=value_order) for key in keys}
    return {key: of_key for key, of_key in values.items() if len(of_key) > 1}


def value_order(value: Any) -> tuple[int, float, str]:
    """Nothing first, then numbers by size, then text."""
    if value is None:
        return 0, 0.0, ""
    if isinstance(value, int | float):
        return 1, float(value), ""
    return 2, 0.0, str(value)
