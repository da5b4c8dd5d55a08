"""Where a comparison isn't fair, or is less sure than it looks: in words for who hasn't thought about it before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from largebatch.report.compare import BY_TEST, Cell, Comparison, RowKey, Setting, value_order
from largebatch.report.load import Run
from largebatch.report.wording import batches, listed, plural, row_label, value

FEW_SEEDS = 3
FEW_STEPS = 100  # the digits' network gets nowhere in 20 and far in 100
# What an optimizer may be tuned by, and what makes rows, columns and repetitions; all else must be equal between rows.
_TUNED = ("optimizer.", "schedule.", "lr_scaling.")
_PLACES = ("batch_size", "seed")
_LENGTHS = ("epochs", "steps")


@dataclass(frozen=True)
class Warn:
    """A short name for what is wrong, and what it means for the reader."""

    title: str
    text: str


def warnings(comparison: Comparison) -> list[Warn]:
    """All that is to be known before the table is believed; the gravest first."""
    checks: tuple[Callable[[Comparison], Iterator[Warn]], ...] = (
        _chosen_on_test, _unequal_conditions, _unequal_lengths, _unequal_trials, _few_seeds, _unequal_seeds,
        _survivors, _few_steps, _edges, _missing, _arithmetic, _code, _unfinished,
    )  # fmt: skip
    return [warning for check in checks for warning in check(comparison)]


def _chosen_on_test(comparison: Comparison) -> Iterator[Warn]:
    cells = [cell for cell in _finished(comparison) if cell.chosen_by == BY_TEST and cell.trials > 1]
    if cells:
        yield Warn(
            "Settings chosen on the test set",
            f"For {_places(comparison, cells)} there were several settings but no validation part, so the test set "
            "itself chose the best of them. Such a figure is too good, and the more settings were tried the more so. "
            "Run with dataset.val_fraction=0.1 to choose on held-out images.",
        )


def _unequal_conditions(comparison: Comparison) -> Iterator[Warn]:
    """Keys beyond the optimizer's own that differ between the rows of a column."""
    found: dict[str, list[int]] = {}
    for batch in comparison.columns:
        column = [(cell.row, list(cell.settings)) for cell in comparison.column(batch)]
        for key in sorted({key for _, settings in column for setting in settings for key in setting.options}):
            if not key.startswith(_TUNED) and key not in _PLACES and not _same(column, key):
                found.setdefault(key, []).append(batch)
    for key, sizes in found.items():
        said = []
        for row in comparison.rows:
            cells = [comparison.cells[row, batch] for batch in sizes if (row, batch) in comparison.cells]
            values = _values((setting for cell in cells for setting in cell.settings), key)
            if cells:
                said.append(f"{row_label(row)}: {', '.join(map(value, values))}")
        name = "Training of different length" if key in _LENGTHS else "Different conditions"
        yield Warn(
            f"{name} ({key})",
            f"At batch {batches(sizes)} {key} isn't the same for all optimizers ({'; '.join(said)}), "
            "so a difference in accuracy may come from it and not from the optimizer.",
        )


def _same(column: list[tuple[RowKey, list[Setting]]], key: str) -> bool:
    first, *others = [_values(settings, key) for _, settings in column]
    return all(values == first for values in others)


def _values(settings: Iterable[Setting], key: str) -> list[Any]:
    return sorted({setting.options.get(key) for setting in settings}, key=value_order)


def _unequal_lengths(comparison: Comparison) -> Iterator[Warn]:
    for key in _LENGTHS:
        cells = [cell for cell in comparison.shown if len(_values(cell.settings, key)) > 1]
        if cells:
            yield Warn(
                f"Settings of different length ({key})",
                f"Among the settings of {_places(comparison, cells)} some trained longer than others; longer training "
                "mostly wins.",
            )


def _unequal_trials(comparison: Comparison) -> Iterator[Warn]:
    unequal = [batch for batch in comparison.columns if len({c.trials for c in comparison.column(batch)}) > 1]
    if unequal:
        said = [
            f"at {batch:,} {listed([f'{row_label(c.row)} {c.trials}' for c in comparison.column(batch)])}"
            for batch in unequal
        ]
        yield Warn(
            "Unequal number of trials",
            f"Not every optimizer was tried with as many settings: {'; '.join(said)}. "
            "The best of many is better for being the best of more.",
        )


def _few_seeds(comparison: Comparison) -> Iterator[Warn]:
    single = [cell for cell in _finished(comparison) if cell.seeds == 1]
    if single:
        yield Warn(
            "One seed only",
            f"The figure of {_places(comparison, single)} rests on a single seed. Another seed gives another figure, "
            "and nothing here says how different it would be: no spread is shown, and nothing is bold beside it.",
        )
    few = [cell for cell in _finished(comparison) if 1 < cell.seeds < FEW_SEEDS]
    if few:
        yield Warn(
            f"Fewer than {FEW_SEEDS} seeds",
            f"The figure of {_places(comparison, few)} rests on two seeds, and their spread is itself very unsure.",
        )


def _unequal_seeds(comparison: Comparison) -> Iterator[Warn]:
    unequal = []
    for batch in comparison.columns:
        chosen = [cell.chosen for cell in comparison.column(batch) if cell.chosen]
        if len({tuple(run.config["seed"] for run in setting.runs) for setting in chosen}) > 1:
            unequal.append(batch)
    if unequal:
        yield Warn(
            "Different seeds",
            f"At batch {batches(unequal)} the compared settings weren't run with the same seeds.",
        )
    uneven = [cell for cell in comparison.shown if len({len(s.runs) for s in cell.settings if s.tried}) > 1]
    if uneven:
        yield Warn(
            "Settings with unequal numbers of seeds",
            f"Among the settings of {_places(comparison, uneven)} some ran with fewer seeds. The mean of few seeds "
            "is high by luck more often, so that such a setting may have been chosen for its luck.",
        )


def _survivors(comparison: Comparison) -> Iterator[Warn]:
    cells = [cell for cell in _finished(comparison) if cell.chosen and cell.chosen.diverged]
    if cells:
        yield Warn(
            "Some seeds diverged",
            f"For {_places(comparison, cells)} training broke down (the loss became infinite or undefined) on some "
            "seeds of the chosen setting. Its mean is over the seeds that went well, and it isn't called a leader.",
        )


def _few_steps(comparison: Comparison) -> Iterator[Warn]:
    found: dict[int, int] = {}
    for cell in _finished(comparison):
        steps = [int(run.summary.get("steps") or 0) for run in cell.chosen.finished] if cell.chosen else []
        if 0 < min(steps, default=0) < FEW_STEPS:
            found[cell.batch_size] = min(steps)
    if found:
        said = listed([f"{steps} at batch {batch:,}" for batch, steps in sorted(found.items())])
        yield Warn(
            "Very few optimizer steps",
            f"Training was short: {said}. In so few no optimizer gets far, and who is ahead is who starts faster. "
            "With equal epochs a larger batch has fewer steps; more epochs show whether the others catch up.",
        )


def _edges(comparison: Comparison) -> Iterator[Warn]:
    cells = []
    for cell in _finished(comparison):
        rates = sorted({setting.options["optimizer.lr"] for setting in cell.settings if setting.tried})
        # The largest rate that worked is no edge where a larger one was tried and diverged.
        if len(rates) > 1 and cell.chosen and cell.chosen.options["optimizer.lr"] in (rates[0], rates[-1]):
            cells.append(cell)
    if cells:
        yield Warn(
            "Best rate at the edge of those tried",
            f"For {_places(comparison, cells)} the chosen learning rate is the smallest or the largest that was tried, "
            "so a better one may lie beyond; compare again with a wider range.",
        )


def _missing(comparison: Comparison) -> Iterator[Warn]:
    missing = [
        f"{row_label(row)} at {batches(absent)}"
        for row in comparison.rows
        if (absent := [batch for batch in comparison.columns if (row, batch) not in comparison.cells])
    ]
    if missing:
        yield Warn("Not everything was run", f"There are no runs of {listed(missing)}.")


def _arithmetic(comparison: Comparison) -> Iterator[Warn]:
    facts: dict[str, Callable[[Run], Any]] = {
        "precision": lambda run: run.summary.get("precision"),
        "device": lambda run: run.summary.get("device"),
        "version of torch": lambda run: _part(run.summary.get("versions"), "torch"),
    }
    for name, fact in facts.items():
        values = _facts(comparison, fact)
        if len(values) > 1:
            yield Warn(
                f"Different {name}",
                f"The runs didn't all have the same {name} ({listed(values)}). Speeds can't be compared then, and "
                "small differences in accuracy may come from it.",
            )


def _code(comparison: Comparison) -> Iterator[Warn]:
    commits = [commit[:10] for commit in _facts(comparison, lambda run: run.summary.get("git_commit"))]
    if len(commits) > 1:
        yield Warn(
            "Different versions of the program",
            f"The runs are of several commits ({listed(commits)}); what changed between them may be what differs here.",
        )
    dirty = sum(bool(run.summary.get("git_dirty")) for run in comparison.runs if run.done)
    if dirty:
        yield Warn(
            "Changed program",
            f"In {plural(dirty, 'run')} the program had changes that aren't in any commit, so nobody can run exactly "
            "the same again.",
        )


def _unfinished(comparison: Comparison) -> Iterator[Warn]:
    states: dict[str, int] = {}
    for run in comparison.runs:
        if not run.done:
            states[run.state] = states.get(run.state, 0) + 1
    if states:
        said = listed([f"{count} {state}" for state, count in sorted(states.items())])
        yield Warn("Runs without a result", f"Not finished and not counted: {said}. The table may change.")


def _finished(comparison: Comparison) -> list[Cell]:
    return [cell for cell in comparison.shown if cell.mean is not None]


def _facts(comparison: Comparison, fact: Callable[[Run], Any]) -> list[str]:
    return sorted({str(found) for run in comparison.runs if run.done and (found := fact(run)) is not None})


def _part(facts: Any, name: str) -> Any:
    return facts.get(name) if isinstance(facts, dict) else None


def _places(comparison: Comparison, cells: Iterable[Cell]) -> str:
    """``"LARS at 64 and 128, TVLARS"``; a row without sizes is meant at every batch size that it has a result at."""
    by_row: dict[RowKey, list[int]] = {}
    for cell in cells:
        by_row.setdefault(cell.row, []).append(cell.batch_size)
    all_of_row: dict[RowKey, list[int]] = {}
    for cell in _finished(comparison):
        all_of_row.setdefault(cell.row, []).append(cell.batch_size)
    if by_row == all_of_row and len(by_row) > 1:
        return "every optimizer at every batch size"
    everywhere = {row for row, sizes in by_row.items() if sizes == all_of_row.get(row)}
    places = {row: "" if row in everywhere else f" at {batches(sizes)}" for row, sizes in by_row.items()}
    return listed([row_label(row) + place for row, place in places.items()])
