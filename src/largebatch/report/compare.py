"""Compare runs: group them into settings, choose one setting for each cell, find the leader of each column.

All functions are pure. The page and docs/report.md explain the rules to readers.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from largebatch.config.optimizers import OPTIMIZERS
from largebatch.config.schedules import SCHEDULES
from largebatch.report.load import Run
from largebatch.report.trials import distinct_trials

BY_VALIDATION = "best/val/accuracy"
BY_TEST = "test/accuracy"
# Metric that the table shows for a setting chosen by the key: at the epoch that validation chose, or at the end.
REPORTED = {BY_VALIDATION: "best/test/accuracy", BY_TEST: "test/accuracy"}


class RowKey(NamedTuple):
    """Key of a table row: optimizer, schedule (with or without warm-up) and the values of the ``--by`` keys."""

    optimizer: str
    schedule: str
    extra: tuple[tuple[str, str], ...] = ()


Place = tuple[RowKey, int]  # of a cell: row and batch size


@dataclass(frozen=True)
class Setting:
    """Runs that differ only in their seed.

    Attributes:
        options: by dotted key, without the seed.
        runs: runs that take part in the choice, by seed.
        confirming: runs of ``largebatch confirm``, by seed.
    """

    options: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    confirming: list[Run] = field(default_factory=list)

    @cached_property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.state == "finished"]

    @cached_property
    def diverged(self) -> list[Run]:
        return [run for run in self.runs if run.state == "diverged"]

    @property
    def tried(self) -> bool:
        """True if the setting counts as a trial: at least one seed finished or diverged."""
        return bool(self.finished or self.diverged)

    @property
    def confirmed(self) -> bool:
        """True if a confirmation run has ended."""
        return any(run.done or run.state == "failed" for run in self.confirming)

    @property
    def reported(self) -> list[Run]:
        return self.confirming if self.confirmed else self.runs

    def values(self, metric: str) -> list[float]:
        """Return ``metric`` of the finished runs that take part in the choice, by seed."""
        return values(self.runs, metric)

    def score(self, metric: str) -> float:
        """Return the mean of ``metric`` over seeds. A diverged seed counts as 0."""
        return sum(self.values(metric)) / len(self.finished + self.diverged)


@dataclass(frozen=True)
class Cell:
    """One row at one batch size: the settings tried, and the results of the chosen setting.

    Attributes:
        chosen: None if no run finished.
        chosen_by: ``BY_VALIDATION``, or ``BY_TEST`` if a setting has no validation accuracy.
        mean: test accuracy of the chosen setting, in 0..1, averaged over its finished seeds.
        spread: its sample standard deviation (divided by n - 1). None with fewer than two seeds.
    """

    row: RowKey
    batch_size: int
    settings: tuple[Setting, ...]
    chosen: Setting | None
    chosen_by: str
    mean: float | None
    spread: float | None

    @property
    def range(self) -> tuple[float, float]:
        """Mean - spread and mean + spread. Infinite with fewer than two seeds."""
        spread = math.inf if self.spread is None else self.spread
        return (self.mean or 0) - spread, (self.mean or 0) + spread

    @property
    def runs(self) -> list[Run]:
        return [run for setting in self.settings for run in (*setting.runs, *setting.confirming)]

    @property
    def confirmed(self) -> bool:
        return self.chosen is not None and self.chosen.confirmed

    @property
    def reported(self) -> list[Run]:
        """Runs of the chosen setting that the table reports: its confirmation runs, else the runs that chose it."""
        return self.chosen.reported if self.chosen else []

    @property
    def lost(self) -> list[Run]:
        """Reported runs that keep the cell from leading: diverged runs, and confirmation runs without a result."""
        return [run for run in self.reported if run.state == "diverged" or (run.confirms and not run.done)]

    @cached_property
    def trials(self) -> int:
        """Number of settings tried, without those next to another (``trials.apart``)."""
        return distinct_trials([setting.options for setting in self.settings if setting.tried])

    @property
    def seeds(self) -> int:
        """Number of finished seeds among the reported runs."""
        return sum(run.state == "finished" for run in self.reported)

    @property
    def diverged(self) -> int:
        """Number of diverged runs of all settings."""
        return sum(run.state == "diverged" for run in self.runs)

    @property
    def drawn(self) -> list[Run]:
        """Runs to draw: the finished reported runs. If no run finished, one setting's diverged runs."""
        runs = self.reported or next((setting.diverged for setting in self.settings if setting.diverged), [])
        return [run for run in runs if run.state == "finished"] or [run for run in runs if run.state == "diverged"]


class Lead(NamedTuple):
    """Result of a column.

    Attributes:
        best: cell with the highest mean. None if no run finished.
        runner_up: cell with the second highest mean.
        clear: True if ``best`` leads by more than the spread. The table shows it in bold.
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
    cells: dict[Place, Cell]  # in the order of rows, then columns
    leads: tuple[Lead, ...]  # one for each column
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
        """Cells that lead their column clearly."""
        return [lead.best for lead in self.leads if lead.clear and lead.best]


def compare(runs: Iterable[Run], by: Sequence[str] = ()) -> list[Comparison]:
    """Return one comparison for each data set, model and mode.

    Args:
        by: dotted configuration keys. Each of their values gets its own row, as optimizers and schedules do.
    """
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        dataset = run.config["dataset"]
        name = f"{dataset['name']} {dataset.get('root')}" if dataset["name"] == "imagefolder" else dataset["name"]
        groups.setdefault((name, run.config["model"]["name"], run.config["mode"]["name"]), []).append(run)
    return [_comparison(key, groups[key], by) for key in sorted(groups)]


def _comparison(key: tuple[str, str, str], runs: list[Run], by: Sequence[str]) -> Comparison:
    tried: dict[Place, list[Run]] = {}
    for run in runs:
        extra = tuple((name, str(run.given.get(name, "none"))) for name in by)
        row = RowKey(run.config["optimizer"]["name"], run.config["schedule"]["name"], extra)
        tried.setdefault((row, run.config["batch_size"]), []).append(run)
    rows = tuple(sorted({row for row, _ in tried}, key=_row_order))
    columns = tuple(sorted({batch for _, batch in tried}))
    places = [(row, batch) for row in rows for batch in columns if (row, batch) in tried]
    cells = {place: choose(*place, settings_of(tried[place])) for place in places}
    leads = tuple(lead(batch, [cell for cell in cells.values() if cell.batch_size == batch]) for batch in columns)
    return Comparison(*key, rows, columns, cells, leads, runs)


def _row_order(row: RowKey) -> tuple[int, int, RowKey]:
    """Sort key: known optimizers first, in the order of ``OPTIMIZERS``; no warm-up before warm-up."""
    optimizer = (*OPTIMIZERS, row.optimizer).index(row.optimizer)
    return optimizer, (*SCHEDULES, row.schedule).index(row.schedule), row


def settings_of(runs: Iterable[Run]) -> tuple[Setting, ...]:
    """Group runs by all options but the seed. Settings are ordered by learning rate, then by their other options."""
    found: dict[str, Setting] = {}
    for run in sorted(runs, key=lambda run: run.config["seed"]):
        options = {key: value for key, value in run.options.items() if key != "seed"}
        setting = found.setdefault(json.dumps(options, sort_keys=True, default=str), Setting(options))
        (setting.confirming if run.confirms else setting.runs).append(run)
    return tuple(sorted(found.values(), key=lambda s: (s.options["optimizer.lr"], json.dumps(s.options, default=str))))


def choose(row: RowKey, batch_size: int, settings: tuple[Setting, ...]) -> Cell:
    """Choose among ``settings``.

    The highest mean over seeds of the best validation accuracy wins; a diverged seed counts as 0. Ties: the setting
    with more finished seeds wins, then the first. The test set chooses only if a setting has no validation accuracy.
    Confirmation runs take no part. If the chosen setting has some that have ended, the cell reports only these.
    """
    candidates = [setting for setting in settings if setting.finished]
    validated = all(_has_validation(run) for setting in candidates for run in setting.finished)
    chosen_by = BY_VALIDATION if validated and candidates else BY_TEST
    chosen = max(candidates, key=lambda s: (s.score(chosen_by), len(s.finished)), default=None)
    accuracies = values(chosen.reported, REPORTED[chosen_by]) if chosen else []
    return Cell(
        row, batch_size, settings, chosen, chosen_by,
        mean=statistics.fmean(accuracies) if accuracies else None,
        spread=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
    )  # fmt: skip


def values(runs: Iterable[Run], metric: str) -> list[float]:
    """Return ``metric`` of the finished runs, in their order."""
    return [value for run in runs if run.state == "finished" and (value := run.metric(metric)) is not None]


def _has_validation(run: Run) -> bool:
    """Return True if validation chose the epoch of the run's best test accuracy."""
    metrics = run.metric(BY_VALIDATION), run.metric(REPORTED[BY_VALIDATION])
    return run.summary.get("best/chosen_by") == "val/accuracy" and None not in metrics


def lead(batch_size: int, cells: Sequence[Cell]) -> Lead:
    """Return the leader of a column.

    The best mean leads clearly if its range mean ± spread lies above the range of every other cell. So each of these
    cells needs at least two seeds, and at least two cells must have finished. A cell with lost seeds never leads
    clearly, because its mean leaves them out. Nor does an unconfirmed cell lead confirmed cells.
    """
    finished = sorted((cell for cell in cells if cell.mean is not None), key=lambda cell: -(cell.mean or 0))
    best, runner_up = [*finished, None, None][:2]
    clear = (
        best is not None
        and not best.lost
        and (best.confirmed or not any(cell.confirmed for cell in finished))
        and runner_up is not None
        # Ranges that touch have no gap; 1e-9 absorbs rounding.
        and best.range[0] - max(other.range[1] for other in finished[1:]) > 1e-9
    )
    return Lead(batch_size, best, runner_up, clear)


def differing(runs: Iterable[Run]) -> dict[str, list[Any]]:
    """Return the configuration keys that differ between runs, with their values. None: a run doesn't set the key."""
    runs = list(runs)
    keys = sorted({key for run in runs for key in run.options})
    return {key: values for key in keys if len(values := distinct(runs, key)) > 1}


def distinct(items: Iterable[Run | Setting], key: str) -> list[Any]:
    """Return the different values of a configuration key: None first, then numbers by size, then text."""
    values = {item.options.get(key) for item in items}
    return sorted(values, key=lambda value: (value is not None, isinstance(value, str), value))
