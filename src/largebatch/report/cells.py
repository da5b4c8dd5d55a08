"""Group runs into settings, and choose one setting for each cell of the table.

All functions are pure. The page and docs/report.md explain the rules to readers.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from largebatch.report.load import Run

BY_VALIDATION = "best/val/accuracy"
BY_TEST = "test/accuracy"
# Metric that the table shows for a setting chosen by the key: at the epoch that validation chose, or at the end.
REPORTED = {BY_VALIDATION: "best/test/accuracy", BY_TEST: "test/accuracy"}


class RowKey(NamedTuple):
    """Key of a table row: optimizer, schedule (with or without warm-up) and the values of further keys.

    These are the structural options in which the row differs from other rows of its optimizer and schedule, and the
    ``--by`` keys.
    """

    optimizer: str
    schedule: str
    extra: tuple[tuple[str, str], ...] = ()


Place = tuple[RowKey, int]  # of a cell: row and batch size


@dataclass(frozen=True)
class Setting:
    """Runs that differ only in their seed."""

    options: dict[str, Any]  # by dotted key, without the seed
    runs: list[Run]  # by seed

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

    def values(self, metric: str) -> list[float]:
        """Return ``metric`` of the finished runs, by seed."""
        return [value for run in self.finished if (value := run.metric(metric)) is not None]

    def score(self, metric: str, without: int | None = None) -> float:
        """Return the mean of ``metric`` over seeds, except seed ``without``. A diverged seed counts as 0.

        -1 if no seed is left.
        """
        values = [run.metric(metric) or 0.0 for run in self.finished if run.seed != without]
        count = len(values) + sum(run.seed != without for run in self.diverged)
        return sum(values) / count if count else -1.0


@dataclass(frozen=True)
class Cell:
    """One row at one batch size: the settings tried, and the results of the chosen setting.

    Attributes:
        chosen: None if no run finished.
        chosen_by: ``BY_VALIDATION``, or ``BY_TEST`` if a setting has no validation accuracy.
        mean: test accuracy of the chosen setting, in 0..1, averaged over its finished seeds.
        spread: its sample standard deviation (divided by n - 1). None with fewer than two seeds.
        flattery: test accuracy that the mean gains because the same seeds choose and report; 0 without a choice. None
            with a single seed.
    """

    row: RowKey
    batch_size: int
    settings: tuple[Setting, ...]
    chosen: Setting | None
    chosen_by: str
    mean: float | None
    spread: float | None
    flattery: float | None

    @property
    def metric(self) -> str:
        """Metric that the table shows."""
        return REPORTED[self.chosen_by]

    @property
    def complete(self) -> bool:
        """True if every seed of the chosen setting finished."""
        return self.chosen is not None and len(self.chosen.finished) == len(self.chosen.runs)

    @property
    def accuracies(self) -> dict[int, float]:
        """Reported test accuracy by seed."""
        runs = self.chosen.finished if self.chosen else []
        return {run.seed: value for run in runs if (value := run.metric(self.metric)) is not None}

    @property
    def runs(self) -> list[Run]:
        return [run for setting in self.settings for run in setting.runs]

    @property
    def trials(self) -> int:
        return sum(setting.tried for setting in self.settings)

    @property
    def seeds(self) -> int:
        """Number of finished seeds of the chosen setting."""
        return len(self.chosen.finished) if self.chosen else 0

    @property
    def diverged(self) -> int:
        """Number of diverged runs of all settings."""
        return sum(len(setting.diverged) for setting in self.settings)

    @property
    def drawn(self) -> list[Run]:
        """Runs to draw: the finished runs of the chosen setting. If no run finished, one setting's diverged runs."""
        return self.chosen.finished if self.chosen else next((s.diverged for s in self.settings if s.diverged), [])


def settings_of(runs: Iterable[Run]) -> tuple[Setting, ...]:
    """Group runs by all options but the seed. Settings are ordered by learning rate, then by their other options."""
    found: dict[str, Setting] = {}
    for run in sorted(runs, key=lambda run: run.config["seed"]):
        options = {key: value for key, value in run.options.items() if key != "seed"}
        found.setdefault(json.dumps(options, sort_keys=True, default=str), Setting(options, [])).runs.append(run)
    return tuple(sorted(found.values(), key=lambda s: (s.options["optimizer.lr"], json.dumps(s.options, default=str))))


def choose(row: RowKey, batch_size: int, settings: tuple[Setting, ...]) -> Cell:
    """Choose among ``settings``.

    The highest mean over seeds of the best validation accuracy wins; a diverged seed counts as 0. Ties: the setting
    with more finished seeds wins, then the first. The test set chooses only if a setting has no validation accuracy.
    """
    candidates = [setting for setting in settings if setting.finished]
    validated = all(_has_validation(run) for setting in candidates for run in setting.finished)
    chosen_by = BY_VALIDATION if validated and candidates else BY_TEST
    chosen = max(candidates, key=lambda s: (s.score(chosen_by), len(s.finished)), default=None)
    values = chosen.values(REPORTED[chosen_by]) if chosen else []
    return Cell(
        row, batch_size, settings, chosen, chosen_by,
        mean=statistics.fmean(values) if values else None,
        spread=statistics.stdev(values) if len(values) > 1 else None,
        flattery=_flattery(chosen, candidates, chosen_by) if chosen else 0.0,
    )  # fmt: skip


def _flattery(chosen: Setting, candidates: Sequence[Setting], chosen_by: str) -> float | None:
    """Return the mean over seeds of the chosen setting's accuracy minus that of the setting that other seeds choose."""
    if len(candidates) == 1:
        return 0.0
    if len(chosen.finished) == 1:
        return None
    gains = []
    for run in chosen.finished:
        best = max(candidates, key=lambda s: (s.score(chosen_by, without=run.seed), len(s.finished)))
        held_out = next((other for other in best.finished if other.seed == run.seed), run)
        gains.append((run.metric(REPORTED[chosen_by]) or 0.0) - (held_out.metric(REPORTED[chosen_by]) or 0.0))
    return statistics.fmean(gains)


def _has_validation(run: Run) -> bool:
    """Return True if validation chose the epoch of the run's best test accuracy."""
    metrics = run.metric(BY_VALIDATION), run.metric(REPORTED[BY_VALIDATION])
    return run.summary.get("best/chosen_by") == "val/accuracy" and None not in metrics


def differing(runs: Iterable[Run]) -> dict[str, list[Any]]:
    """Return the configuration keys that differ between runs, with their values. None: a run doesn't set the key."""
    runs = list(runs)
    keys = sorted({key for run in runs for key in run.options})
    return {key: values for key in keys if len(values := distinct(runs, key)) > 1}


def distinct(items: Iterable[Run | Setting], key: str) -> list[Any]:
    """Return the different values of a configuration key: None first, then numbers by size, then text."""
    values = {item.options.get(key) for item in items}
    return sorted(values, key=lambda value: (value is not None, isinstance(value, str), value))
