"""Warn where a comparison is unfair, or less certain than it looks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import starmap

from largebatch.report import spaces
from largebatch.report.cells import BY_TEST, distinct
from largebatch.report.compare import Comparison
from largebatch.report.idle import idle
from largebatch.report.inference import FEWEST_SEEDS
from largebatch.report.load import Run, flat
from largebatch.report.warn import Check, Warn, check_cells, names_of
from largebatch.report.wording import batches, listed, plural, row_label, states, value

MANY_SKIPPED = 0.01  # of the steps; the first scales of fp16's loss always cost a few steps
FEW_STEPS = 100  # the digits' network learns little in 20 steps and most in 100
# Options that may differ between rows: those of the optimizer, and those that make columns and repetitions.
_TUNED = ("optimizer.", "schedule.", "lr_scaling.")
_PLACES = ("batch_size", "seed")
_LENGTHS = ("epochs", "steps")


def warnings(comparison: Comparison) -> list[Warn]:
    """Return everything that a reader must know before trusting the table, the most serious first."""
    return [warning for check in _CHECKS for warning in check(comparison)]


def _unequal_conditions(comparison: Comparison) -> Iterator[Warn]:
    """Warn of keys that differ between the rows of a column and belong to no optimizer."""
    found: dict[str, list[int]] = defaultdict(list)
    shown = all("batch_schedule" in dict(row.extra) for row in comparison.rows)  # in the name of each row
    tuned = (*_TUNED, "batch_schedule.") if shown else _TUNED
    for batch in comparison.columns:
        column = comparison.column(batch)
        for key in sorted({key for cell in column for setting in cell.settings for key in setting.options}):
            different = len({tuple(distinct(cell.settings, key)) for cell in column}) > 1
            if different and not key.startswith(tuned) and key not in _PLACES:
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
        reported = [cell.reported for cell in comparison.column(batch) if cell.reported]
        if len({tuple(run.config["seed"] for run in runs) for runs in reported}) > 1:
            unequal.append(batch)
    if unequal:
        yield Warn("Different seeds", f"At batch {batches(unequal)}, the compared settings ran with different seeds.")


def _flattered(comparison: Comparison) -> Iterator[Warn]:
    """Warn of cells whose accuracy is reported by the same runs that chose the setting."""
    said = [
        f"{row_label(cell.row)} at {cell.batch_size:,} "
        + ("by an unknown amount" if cell.flattery is None else f"by {100 * cell.flattery:.2f} points")
        for cell in comparison.finished
        if cell.flattery is None or cell.flattery > 0
    ]
    if said:
        yield Warn(
            "Accuracy of the best of several settings",
            f"The same runs choose a setting and report its accuracy, which flatters it: {listed(said)}, estimated "
            "from the settings that the other seeds choose. p-values are corrected for the number of settings, but "
            "differences and their intervals aren't.",
        )


def _unconfirmed(comparison: Comparison) -> Iterator[Warn]:
    cells = [cell for cell in comparison.finished if not cell.confirmed]
    if comparison.confirmed and cells:
        yield Warn(
            "Unconfirmed cells",
            f"For {names_of(comparison, cells)}, the same runs chose the setting and report it, so their accuracy may "
            "be high by luck. The other cells show confirmation runs. Run largebatch confirm again.",
        )


def _few_steps(comparison: Comparison) -> Iterator[Warn]:
    found: dict[int, int] = {}
    for cell in comparison.finished:
        steps = [int(run.metric("step" if _stopped_early(run) else "steps") or 0) for run in cell.drawn]
        if 0 < min(steps, default=0) < FEW_STEPS:
            found[cell.batch_size] = min(steps)
    if found:
        said = listed([f"{steps} steps at batch {batch:,}" for batch, steps in sorted(found.items())])
        yield Warn(
            "Very few optimizer steps",
            f"Training was short: {said}. In so few steps, the optimizer that starts faster is ahead. "
            "With equal epochs, a larger batch has fewer steps. Train for more epochs to see if the others catch up.",
        )


def _stopped_early(run: Run) -> bool:
    return run.summary.get("stopped_early") is True


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
        "precision": "precision", "memory format (channels_last)": "channels_last", "use of TF32": "tf32",
        "use of torch.compile": "compiled", "device": "device",
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


def _skipped_steps(comparison: Comparison) -> Iterator[Warn]:
    """Warn of runs in fp16 that lack updates."""
    shares: dict[str, float] = defaultdict(float)
    for cell in comparison.finished:
        for run in cell.drawn:
            share = (run.metric("optim/skipped_steps") or 0.0) / (run.metric("steps") or math.inf)
            shares[row_label(cell.row)] = max(shares[row_label(cell.row)], share)
    said = [f"{label} up to {share:.1%}" for label, share in shares.items() if share > MANY_SKIPPED]
    if said:
        yield Warn(
            "Skipped optimizer steps",
            f"Runs in fp16 skipped steps whose gradient overflowed: {listed(said)} of all steps. These updates are "
            "missing. Run with precision=bf16 or fp32.",
        )


def _unfinished(comparison: Comparison) -> Iterator[Warn]:
    said = listed(states(run for run in comparison.runs if not run.done))
    if said:
        yield Warn("Runs without a result", f"These runs don't count yet: {said}. The table may change.")


_CHECKS: tuple[Check, ...] = (
    check_cells(
        "Settings chosen on the test set",
        "For {}, the test set itself chose the best of several settings, because there are no validation images. "
        "Such an accuracy is too high, and more so with more settings. "
        "Run with dataset.val_fraction=0.1 to choose on held-out images.",
        lambda cell: cell.chosen is not None and cell.chosen_by == BY_TEST and cell.trials > 1,
    ),
    _unequal_conditions,
    *(
        check_cells(
            f"Settings of different length ({key})",
            "For {}, some settings trained longer than others. Longer training usually wins.",
            lambda cell, key=key: len(distinct(cell.settings, key)) > 1,  # type: ignore[misc]
        )
        for key in _LENGTHS
    ),
    check_cells(
        "Training stopped early",
        "For {}, early_stopping ended some runs before their full length, when validation accuracy no longer rose. "
        "Such runs differ in length, and their learning rate may not have fallen yet, so another length or schedule "
        "may change the order. Compare runs of full length: early_stopping=null.",
        lambda cell: any(map(_stopped_early, cell.runs)),
    ),
    _unequal_trials,
    check_cells(
        "One seed only",
        "The accuracy of {} comes from a single seed. Another seed gives another accuracy, and the difference is "
        "unknown. So no other optimizer is compared with it.",
        lambda cell: cell.seeds == 1,
    ),
    check_cells(
        f"Fewer than {FEWEST_SEEDS} seeds",
        "The accuracy of {} comes from two seeds, which is too few for a comparison.",
        lambda cell: 1 < cell.seeds < FEWEST_SEEDS,
    ),
    _unequal_seeds,
    check_cells(
        "Settings with unequal numbers of seeds",
        "For {}, some settings have fewer seeds than others. A mean of few seeds is more often high by luck, so luck "
        "may have chosen the setting.",
        lambda cell: len({len(setting.runs) for setting in cell.settings if setting.tried}) > 1,
    ),
    check_cells(
        "Some seeds diverged",
        "For {}, some seeds of the chosen setting diverged: the loss became infinite or undefined. "
        "The mean is over the other seeds, and the optimizer is never ahead.",
        lambda cell: any(run.state == "diverged" for run in cell.reported),
    ),
    check_cells(
        "Some seeds didn't finish",
        "For {}, some seeds of the chosen setting failed, stopped or are still running. The mean is over the other "
        "seeds, and the optimizer is never ahead. The same command resumes these runs.",
        lambda cell: not all(run.done for run in cell.reported),
    ),
    _flattered,
    _unconfirmed,
    _few_steps,
    *spaces.CHECKS,
    lambda comparison: starmap(Warn, idle(comparison)),
    _missing,
    _provenance,
    _skipped_steps,
    _unfinished,
)
