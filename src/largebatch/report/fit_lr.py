"""``largebatch fit-lr``: fit laws of the best learning rate over the batch size, for each row of the report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from largebatch.errors import UserError
from largebatch.report.best_lr import Accuracy, Best, Estimate, best_lr, chosen_accuracy, seed_noise
from largebatch.report.build import compared, name_problems
from largebatch.report.cells import BY_VALIDATION, Cell, RowKey
from largebatch.report.compare import Comparison
from largebatch.report.curves import points_of
from largebatch.report.load import Problem, load_runs, read_history
from largebatch.report.lr_laws import FEWEST_BATCHES, LAWS, Choice, Fit, choose, fit_laws, parameter_text, surge_with
from largebatch.report.noise import measured_noise
from largebatch.report.wording import plural, row_label, title
from largebatch.runs.table import plain_table

_LARGEST = 2**53


class RowFit(NamedTuple):
    """Laws fitted to a row of a comparison.

    Attributes:
        fits: one for each law; empty if too few batch sizes have a best learning rate.
        noise: measured gradient noise scale, in images.
    """

    row: RowKey
    bests: list[Best]
    next_batch: int
    fits: list[Fit]
    choice: Choice
    noise: Estimate | None


def fit_lr(
    runs_dir: Path, by: Sequence[str] = (), batch: int | None = None, epochs: float | None = None,
    *, as_json: bool = False,
) -> str:  # fmt: skip
    """Return the best learning rates of each row, the fitted laws, and the learning rate at another batch size.

    Args:
        by: dotted configuration keys that make rows, as in the report.
        batch: batch size of the prediction. None: twice the largest that has a best learning rate.
        epochs: validate at the last evaluation up to this epoch, as if the training were so short. None: whole
            training.

    Raises:
        UserError: for an invalid option, folder or key, or if no run has finished.
    """
    if batch is not None and not 1 <= batch <= _LARGEST:
        raise UserError(f"--batch={batch}: not a batch size. Allowed: 1 to {_LARGEST}")
    if epochs is not None and not 0 < epochs < math.inf:
        raise UserError(f"--epochs={epochs:g}: not a length of training. Allowed: numbers above 0")
    runs, problems = load_runs(runs_dir)
    comparisons = compared(runs, by)
    accuracy = chosen_accuracy if epochs is None else _accuracy_after(epochs, comparisons, problems)
    found = [(one, _fits(one, accuracy, batch, epochs, problems)) for one in comparisons]
    name_problems(runs_dir, runs, problems)
    if not any(cell.chosen for one in comparisons for cell in one.cells.values()):
        raise UserError(f"{runs_dir}: no run has finished, so there is nothing to fit. Fix: finish the runs first")
    if as_json:
        return json.dumps([_record(one, fits) for one, fits in found], indent=1)
    return "\n\n".join("\n\n".join([title(one), *map(_text, fits)]) for one, fits in found)


def _fits(
    comparison: Comparison, accuracy: Callable[[Cell], Accuracy], batch: int | None, epochs: float | None,
    problems: list[Problem],
) -> list[RowFit]:  # fmt: skip
    seeds = seed_noise(comparison.cells.values(), accuracy)
    found = []
    for row in comparison.rows:
        cells = comparison.row(row)
        bests = [best_lr(cell, accuracy(cell), seeds) for cell in cells]
        if epochs is not None:
            none = f"no run was evaluated up to epoch {epochs:g}"
            bests = [
                best if any(map(accuracy(cell), cell.reported)) else Best(cell.batch_size, 0, reason=none)
                for best, cell in zip(bests, cells, strict=True)
            ]
        if epochs is not None and row.schedule != "constant":
            reason = f"--epochs={epochs:g} needs a constant learning rate; a shorter {row.schedule} is another training"
            bests = [Best(cell.batch_size, 0, reason=reason) for cell in cells]
        known = [best.batch_size for best in bests if best.log is not None]
        next_batch = batch or 2 * max(known or [cell.batch_size for cell in cells])
        noise = measured_noise(cells, problems, epochs)
        # Without an upper limit, the estimate is far too low.
        fits = fit_laws(bests, next_batch, (*LAWS, *([surge_with(noise.value)] if noise and noise.high else [])))
        few = f"best learning rates at {plural(len(known), 'batch size')}; a choice of laws needs {FEWEST_BATCHES}"
        choice = choose(fits) if fits else Choice(None, 0.0, None, few)
        found.append(RowFit(row, bests, next_batch, fits, choice, noise))
    return found


def _accuracy_after(
    epochs: float, comparisons: Sequence[Comparison], problems: list[Problem]
) -> Callable[[Cell], Accuracy]:
    """Return, for a cell, the function of a run's best accuracy up to this epoch; 0 if the run diverged before.

    An evaluation belongs to an epoch if its step is the first to complete it. A large batch ends a part of an epoch
    later.
    """
    by_run: dict[tuple[str, str], float] = {}
    for run in (run for one in comparisons for run in one.runs if run.done):
        rows = read_history(run, problems)
        for metric in ("val/accuracy", "test/accuracy"):
            points = points_of(rows, metric).values()
            reached = [value for value, at in points if at.epochs * (1 - 1 / max(at.steps, 1)) < epochs - 1e-6]
            if reached:
                by_run[run.name, metric] = max(reached)
    if not by_run:
        raise UserError(
            f"--epochs={epochs:g}: no run was evaluated so early. Fix: a larger number, or smaller eval_every"
        )

    def of_cell(cell: Cell) -> Accuracy:
        metric = "val/accuracy" if cell.chosen_by == BY_VALIDATION else "test/accuracy"
        return lambda run: by_run.get((run.name, metric), 0.0)

    return of_cell


def _text(found: RowFit) -> str:
    """Return a row's tables and sentences."""
    bests = [
        [f"{best.batch_size:,}", str(best.tried), best.lr.text if best.lr else "-", best.reason] for best in found.bests
    ]
    parts = [row_label(found.row), plain_table(["batch", "tried", "best learning rate (90 %)", ""], bests)]
    if found.fits:
        heads = ["law", "formula", "parameter (90 %)", "chi2", "p", "weight", f"learning rate at {found.next_batch:,}"]
        lines = [
            [
                fit.law.name, fit.law.formula, parameter_text(fit),
                f"{fit.chi2:.1f}", f"{fit.p:.2g}", f"{fit.weight:.0%}", fit.next.text,
            ]
            for fit in sorted(found.fits, key=lambda fit: -fit.weight)
        ]  # fmt: skip
        parts.append(plain_table(heads, lines))
    words = f"Law: {found.choice.words}."
    if found.choice.lr:
        words += f" Learning rate at batch {found.next_batch:,}: {found.choice.lr.text}."
    if found.noise:
        words += f" Measured noise scale: {found.noise.text}."
    return "\n".join([*parts, words])


def _record(comparison: Comparison, found: Sequence[RowFit]) -> dict[str, Any]:
    names = {"dataset": comparison.dataset, "model": comparison.model, "mode": comparison.mode}
    return names | {"rows": [_row_record(one) for one in found]}


def _row_record(found: RowFit) -> dict[str, Any]:
    return {
        "row": row_label(found.row),
        "optimizer": found.row.optimizer,
        "schedule": found.row.schedule,
        "batches": [
            {
                "batch_size": best.batch_size, "tried": best.tried, "lr": best.lr and best.lr.record(),
                "reason": best.reason or None,
            }
            for best in found.bests
        ],
        "next_batch": found.next_batch,
        "laws": [
            {
                "law": fit.law.name, "formula": fit.law.formula, "c": fit.c,
                "parameter": fit.parameter and fit.parameter.record(), "chi2": fit.chi2, "p": fit.p,
                "weight": fit.weight, "lr": fit.next.record(),
            }
            for fit in found.fits
        ],
        "chosen": found.choice.law.name if found.choice.law else None,
        "sure": found.choice.sure,
        "lr": found.choice.lr and found.choice.lr.record(),
        "words": found.choice.words,
        "noise_scale": found.noise and found.noise.record(),
    }  # fmt: skip
