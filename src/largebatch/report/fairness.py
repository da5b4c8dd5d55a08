"""Warn where a comparison is unfair, or less certain than it looks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from largebatch.report.compare import BY_TEST, Cell, Comparison, distinct
from largebatch.report.load import flat
from largebatch.report.wording import batches, listed, plural, row_label, states, value

FEW_SEEDS = 3
FEW_STEPS = 100  # the digits' network learns little in 20 steps and most in 100
# Options that may differ between rows: those of the optimizer, and those that make columns and repetitions.
_TUNED = ("optimizer.", "schedule.", "lr_scaling.")
_PLACES = ("batch_size", "seed")
_LENGTHS = ("epochs", "steps")


class Warn(NamedTuple):
    """A problem's short name, and its meaning for the reader."""

    title: str
    text: str


def warnings(comparison: Comparison) -> list[Warn]:
    """Return everything that a reader must know before trusting the table, the most serious first."""
    return [warning for check in _CHECKS for warning in check(comparison)]


Check = Callable[[Comparison], Iterator[Warn]]


def _cells(title: str, text: str, test: Callable[[Cell], bool]) -> Check:
    """Return a check that warns about the cells that pass ``test``. ``text`` has ``{}`` for their names."""

    def check(comparison: Comparison) -> Iterator[Warn]:
        found = [cell for cell in comparison.shown if test(cell)]
        if found:
            yield Warn(title, text.format(_names(comparison, found)))

    return check


def _at_edge(cell: Cell) -> bool:
    """Return True if the chosen learning rate is the smallest or largest tried. Diverged settings count as tried."""
    rates = sorted({setting.options["optimizer.lr"] for setting in cell.settings if setting.tried})
    return len(rates) > 1 and cell.chosen is not None and cell.chosen.options["optimizer.lr"] in (rates[0], rates[-1])


def _unequal_conditions(comparison: Comparison) -> Iterator[Warn]:
    """Warn of keys that differ between the rows of a column and belong to no optimizer."""
    found: dict[str, list[int]] = defaultdict(list)
    for batch in comparison.columns:
        column = comparison.column(batch)
        for key in sorted({key for cell in column for setting in cell.settings for key in setting.options}):
            different = len({tuple(distinct(cell.settings, key)) for cell in column}) > 1
            if different and not key.startswith(_TUNED) and key not in _PLACES:
                found[key].append(batch)
    for key, sizes in found.items():
        said = []
        for row in comparison.rows:
            settings = [s for cell in comparison.row(row) if cell.batch_size in sizes for s in cell.settings]
            if settings:
                said.append(f"{row_label(row)}: {', '.join(map(value, distinct(settings, key)))}")
        name = "Training of different length" if key in _LENGTHS else "Different conditions"
        yield Warn(
            f"{name} ({key})",
            f"At batch {batches(sizes)}, {key} differs between optimizers ({'; '.join(said)}). "
            f"A difference in accuracy may come from {key} and not from the optimizer.",
        )


def _unequal_trials(comparison: Comparison) -> Iterator[Warn]:
    said = []
    for batch in comparison.columns:
        column = comparison.column(batch)
        if len({cell.trials for cell in column}) > 1:
            said.append(f"at {batch:,} {listed([f'{row_label(cell.row)} {cell.trials}' for cell in column])}")
    if said:
        yield Warn(
            "Unequal number of trials",
            f"The optimizers have different numbers of settings: {'; '.join(said)}. "
            "More settings give a higher best accuracy by chance alone.",
        )


def _unequal_seeds(comparison: Comparison) -> Iterator[Warn]:
    unequal = []
    for batch in comparison.columns:
        chosen = [cell.chosen for cell in comparison.column(batch) if cell.chosen]
        if len({tuple(run.config["seed"] for run in setting.runs) for setting in chosen}) > 1:
            unequal.append(batch)
    if unequal:
        yield Warn("Different seeds", f"At batch {batches(unequal)}, the compared settings ran with different seeds.")


def _few_steps(comparison: Comparison) -> Iterator[Warn]:
    found: dict[int, int] = {}
    for cell in comparison.finished:
        steps = [int(run.summary.get("steps") or 0) for run in cell.chosen.finished] if cell.chosen else []
        if 0 < min(steps, default=0) < FEW_STEPS:
            found[cell.batch_size] = min(steps)
    if found:
        said = listed([f"{steps} steps at batch {batch:,}" for batch, steps in sorted(found.items())])
        yield Warn(
            "Very few optimizer steps",
            f"Training was short: {said}. In so few steps, the optimizer that starts faster is ahead. "
            "With equal epochs, a larger batch has fewer steps. Train for more epochs to see if the others catch up.",
        )


def _missing(comparison: Comparison) -> Iterator[Warn]:
    missing = [
        f"{row_label(row)} at {batches(absent)}"
        for row in comparison.rows
        if (absent := [batch for batch in comparison.columns if (row, batch) not in comparison.cells])
    ]
    if missing:
        yield Warn("Missing runs", f"There are no runs of {listed(missing)}.")


def _provenance(comparison: Comparison) -> Iterator[Warn]:
    """Warn of different arithmetic and different code."""
    summaries = [flat(run.summary) for run in comparison.runs if run.done]

    def distinct_facts(key: str) -> list[str]:
        return sorted({str(summary[key]) for summary in summaries if key in summary})

    facts = {
        "precision": "precision", "memory format (channels_last)": "channels_last", "device": "device",
        "version of torch": "versions.torch",
    }  # fmt: skip
    for name, key in facts.items():
        values = distinct_facts(key)
        if len(values) > 1:
            yield Warn(
                f"Different {name}",
                f"The runs differ in their {name}: {listed(values)}. So their speeds can't be compared, and small "
                "differences in accuracy may come from it.",
            )
    commits = [commit[:10] for commit in distinct_facts("git_commit")]
    if len(commits) > 1:
        yield Warn(
            "Different versions of the program",
            f"The runs come from several commits: {listed(commits)}. Differences between runs may come from the code.",
        )
    dirty = sum(bool(summary.get("git_dirty")) for summary in summaries)
    if dirty:
        yield Warn(
            "Uncommitted changes",
            f"The program had uncommitted changes in {plural(dirty, 'run')}. Such a run can't be repeated exactly.",
        )


def _unfinished(comparison: Comparison) -> Iterator[Warn]:
    said = listed(states(run for run in comparison.runs if not run.done))
    if said:
        yield Warn("Runs without a result", f"These runs don't count yet: {said}. The table may change.")


def _names(comparison: Comparison, cells: Sequence[Cell]) -> str:
    """Return ``"LARS at 64 and 128, TVLARS"``. A row without sizes stands for all of its batch sizes with a result."""
    rows = list(dict.fromkeys(cell.row for cell in cells))
    if cells == comparison.finished and len(rows) > 1:
        return "every optimizer at every batch size"
    names = []
    for row in rows:
        of_row = [cell for cell in cells if cell.row == row]
        is_whole = of_row == [cell for cell in comparison.finished if cell.row == row]
        names.append(row_label(row) + ("" if is_whole else f" at {batches(cell.batch_size for cell in of_row)}"))
    return listed(names)


_CHECKS: tuple[Check, ...] = (
    _cells(
        "Settings chosen on the test set",
        "For {}, the test set itself chose the best of several settings, because there are no validation images. "
        "Such an accuracy is too high, and more so with more settings. "
        "Run with dataset.val_fraction=0.1 to choose on held-out images.",
        lambda cell: cell.chosen is not None and cell.chosen_by == BY_TEST and cell.trials > 1,
    ),
    _unequal_conditions,
    *(
        _cells(
            f"Settings of different length ({key})",
            "For {}, some settings trained longer than others. Longer training usually wins.",
            lambda cell, key=key: len(distinct(cell.settings, key)) > 1,  # type: ignore[misc]
        )
        for key in _LENGTHS
    ),
    _unequal_trials,
    _cells(
        "One seed only",
        "The accuracy of {} comes from a single seed. Another seed gives another accuracy, and the difference is "
        "unknown. So the table shows no spread, and nothing in the column is bold.",
        lambda cell: cell.seeds == 1,
    ),
    _cells(
        f"Fewer than {FEW_SEEDS} seeds",
        "The accuracy of {} comes from two seeds, so its spread is very uncertain.",
        lambda cell: 1 < cell.seeds < FEW_SEEDS,
    ),
    _unequal_seeds,
    _cells(
        "Settings with unequal numbers of seeds",
        "For {}, some settings have fewer seeds than others. A mean of few seeds is more often high by luck, so luck "
        "may have chosen the setting.",
        lambda cell: len({len(setting.runs) for setting in cell.settings if setting.tried}) > 1,
    ),
    _cells(
        "Some seeds diverged",
        "For {}, some seeds of the chosen setting diverged: the loss became infinite or undefined. "
        "The mean is over the other seeds, and the setting can't lead its column.",
        lambda cell: cell.chosen is not None and bool(cell.chosen.diverged),
    ),
    _few_steps,
    _cells(
        "Best learning rate at the edge of the range",
        "For {}, the chosen learning rate is the smallest or the largest tried. A better learning rate may lie beyond. "
        "Compare again with a wider range.",
        _at_edge,
    ),
    _missing,
    _provenance,
    _unfinished,
)
