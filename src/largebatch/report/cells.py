"""Group runs into settings, and choose one setting for each cell of the table.

All functions are pure. The page and docs/report.md explain the rules to readers.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from largebatch.report.load import Run
from largebatch.report.trials import distinct_trials

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
        return finished(self.runs)

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
        flattery: test accuracy that the mean gains because the same seeds choose and report; 0 without a choice, and in
            a confirmed cell. None with a single seed.
    """

    row: RowKey
    batch_size: int
    settings: tuple[Setting, ...]
    chosen: Setting | None
    chosen_by: str
    flattery: float | None

    @property
    def metric(self) -> str:
        """Metric that the table shows."""
        return REPORTED[self.chosen_by]

    @property
    def confirmed(self) -> bool:
        return self.chosen is not None and self.chosen.confirmed

    @property
    def reported(self) -> list[Run]:
        """Runs of the chosen setting that the table reports: its confirmation runs, else the runs that chose it."""
        if self.chosen is None:
            return []
        return self.chosen.confirming if self.confirmed else self.chosen.runs

    @property
    def complete(self) -> bool:
        """True if every reported run finished."""
        return bool(self.reported) and all(run.state == "finished" for run in self.reported)

    @cached_property
    def accuracies(self) -> dict[int, float]:
        """Reported test accuracy, in 0..1, of the finished runs, by seed."""
        return {run.seed: a for run in finished(self.reported) if (a := run.metric(self.metric)) is not None}

    @property
    def mean(self) -> float | None:
        """Mean of ``accuracies``."""
        return statistics.fmean(self.accuracies.values()) if self.accuracies else None

    @property
    def spread(self) -> float | None:
        """Sample standard deviation of ``accuracies`` (divided by n - 1). None with fewer than two seeds."""
        return statistics.stdev(self.accuracies.values()) if self.seeds > 1 else None

    @property
    def runs(self) -> list[Run]:
        return [run for setting in self.settings for run in (*setting.runs, *setting.confirming)]

    @cached_property
    def attempts(self) -> list[list[Setting]]:
        """Settings tried. Those next to another (``trials.apart``) are one attempt."""
        tried = [setting for setting in self.settings if setting.tried]
        return [[tried[i] for i in trial] for trial in distinct_trials([setting.options for setting in tried])]

    @property
    def trials(self) -> int:
        """Number of attempts."""
        return len(self.attempts)

    @property
    def choices(self) -> int:
        """Number of settings of which the reported runs chose the best; 1 in a confirmed cell.

        Settings next to each other count too: the best of equal settings is as lucky as the best of different ones.
        """
        return 1 if self.confirmed else sum(setting.tried for setting in self.settings)

    @property
    def seeds(self) -> int:
        """Number of finished seeds among the reported runs."""
        return len(self.accuracies)

    @property
    def diverged(self) -> int:
        """Number of diverged runs of all settings."""
        return sum(run.state == "diverged" for run in self.runs)

    @property
    def drawn(self) -> list[Run]:
        """Runs to draw: the finished reported runs. If no run finished, one setting's diverged runs."""
        runs = self.reported or next((setting.diverged for setting in self.settings if setting.diverged), [])
        return finished(runs) or [run for run in runs if run.state == "diverged"]


def finished(runs: Iterable[Run]) -> list[Run]:
    return [run for run in runs if run.state == "finished"]


def values(runs: Iterable[Run], metric: str) -> list[float]:
    """Return ``metric`` of the finished runs, in their order."""
    return [value for run in finished(runs) if (value := run.metric(metric)) is not None]


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
    flattery = 0.0 if chosen is None or chosen.confirmed else _flattery(chosen, candidates, chosen_by)
    return Cell(row, batch_size, settings, chosen, chosen_by, flattery)


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
