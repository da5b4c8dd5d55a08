"""``largebatch critical``: the batch size of each row beyond which more devices save little time.

McCandlish et al. (arXiv 1812.06162): steps S and images E = B * S to a target follow the hyperbola
``(S / S_min - 1) * (E / E_min - 1) = 1``. So ``S = S_min * (1 + B_crit / B)`` and ``E = E_min * (1 + B / B_crit)`` with
the critical batch size ``B_crit = E_min / S_min``, at which both are twice their minimum.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from largebatch.errors import UserError
from largebatch.report.best_lr import Estimate
from largebatch.report.build import check_target, compared, name_problems
from largebatch.report.cells import RowKey
from largebatch.report.compare import Comparison
from largebatch.report.curves import read_histories
from largebatch.report.load import Problem, load_runs
from largebatch.report.lr_laws import FEWEST_BATCHES, Fit, Law, fit_law
from largebatch.report.noise import measured_noise
from largebatch.report.parting import Parting, parting
from largebatch.report.targets import Reached, Target, TimeToTarget, time_to_target
from largebatch.report.wording import plural, row_label, three_digits, title
from largebatch.runs.table import plain_table

# Relative standard deviation of the steps of a seed, without enough seeds to measure it.
_SEED_SCATTER = 0.1
_FEWEST_DF = 4
_MEDIAN = 1.25  # the standard error of a median, in those of a mean
_STEPS = Law("steps", "S = S_min * (1 + B_crit/B)", lambda b, n: np.logaddexp(0.0, n - b), "N")
_IMAGES = Law("images", "E = E_min * (1 + B/B_crit)", lambda b, n: np.logaddexp(0.0, b - n), "N")


class Time(NamedTuple):
    """Training of a batch size up to the target.

    Attributes:
        steps: median over seeds, halfway between the evaluation that reaches the target and the evaluation before. None
            if the median seed never reaches it, 0 if it meets it before its first step.
        deviation: relative standard error.
        seeds: ``"2 of 3 seeds"``.
    """

    batch_size: int
    steps: float | None
    deviation: float
    seeds: str


class Critical(NamedTuple):
    """Hyperbola of a row.

    Attributes:
        batch_size: the critical batch size. None: too few batch sizes reached the target.
        steps, images: fewest steps and fewest images to the target.
        p: probability of a worse fit, before the standard errors are widened by the misfit.
        noise: measured gradient noise scale, in images.
        words: one sentence.
        parting: for runs with ``start_from``, where their loss parts.
    """

    row: RowKey
    times: list[Time]
    batch_size: Estimate | None
    steps: Estimate | None
    images: Estimate | None
    p: float | None
    noise: Estimate | None
    words: str
    parting: Parting | None = None


def critical(runs_dir: Path, target: Target, by: Sequence[str] = (), *, as_json: bool = False) -> str:
    """Return the training to the target at each batch size, and the critical batch size of each row.

    Raises:
        UserError: for an invalid target, folder or key, or if no run reached anything.
    """
    check_target(target)
    runs, problems = load_runs(runs_dir)
    found = []
    for comparison in compared(runs, by):
        times = time_to_target(comparison, read_histories(comparison, problems), target)
        if times:
            found.append((comparison, times, criticals(comparison, times, problems)))
    name_problems(runs_dir, runs, problems)
    if not found:
        raise UserError(f"{runs_dir}: no run has learned anything. Fix: finish the runs first, or give --target")
    if as_json:
        return json.dumps([_record(*one) for one in found], indent=1)
    return "\n\n".join(
        "\n\n".join([f"{title(comparison)}: training to {times.goal.text}", *map(_text, rows)])
        for comparison, times, rows in found
    )


def criticals(comparison: Comparison, times: TimeToTarget, problems: list[Problem]) -> list[Critical]:
    scatter = _scatter(times.cells.values())
    found = []
    for row in comparison.rows:
        cells = comparison.row(row)
        if any(run.given.get("batch_schedule.shape", "constant") != "constant" for cell in cells for run in cell.runs):
            continue  # its steps have no one batch size
        of_row = [_time(cell.batch_size, times.cells[row, cell.batch_size], scatter) for cell in cells]
        fitted = _hyperbola(row, of_row, measured_noise(cells, problems))
        branches = any(run.config.get("start_from") for run in comparison.runs)
        found.append(fitted._replace(parting=parting(cells) if branches else None))
    return found


def _scatter(results: Iterable[Reached]) -> float:
    """Return the standard deviation of the log steps of a seed, pooled over cells in which all seeds reached."""
    squares, freedom = 0.0, 0
    for result in results:
        if len(result.seeds) > 1 and result.reached == len(result.seeds):
            logs = [math.log(max(seed.steps, 1)) for seed in result.seeds]
            squares += statistics.variance(logs) * (len(logs) - 1)
            freedom += len(logs) - 1
    return math.sqrt(squares / freedom) if freedom >= _FEWEST_DF else _SEED_SCATTER


def _time(batch_size: int, result: Reached, scatter: float) -> Time:
    seeds = f"{result.reached} of {plural(len(result.seeds), 'seed')}"
    steps = result.median.steps if result.median else math.inf
    if math.isinf(steps):
        return Time(batch_size, None, 0.0, seeds)
    if not steps:
        return Time(batch_size, 0.0, 0.0, seeds)
    before = statistics.median(result.before)
    middle = (steps + before) / 2
    # The target is reached anywhere between two evaluations.
    between = (steps - before) / math.sqrt(12) / middle
    count = len(result.seeds)
    return Time(batch_size, middle, math.hypot(between, scatter * (_MEDIAN if count > 2 else 1) / count**0.5), seeds)


def _hyperbola(row: RowKey, times: list[Time], noise: Estimate | None) -> Critical:
    known = [time for time in times if time.steps]
    if len(known) < FEWEST_BATCHES:
        words = f"{plural(len(known), 'batch size')} reached the target; the hyperbola needs {FEWEST_BATCHES}"
        if any(time.steps == 0 for time in times):
            words = "runs meet the target before their first step; the hyperbola needs a harder target"
        return Critical(row, times, None, None, None, None, noise, words)
    b = np.log([float(time.batch_size) for time in known])
    y = np.log([float(time.steps or 0) for time in known])
    w = np.array([time.deviation for time in known]) ** -2.0
    first = fit_law(_STEPS, b, y, w, math.inf)
    w /= max(1.0, first.chi2 / (len(known) - 2))  # a bad fit widens the intervals
    steps, images = fit_law(_STEPS, b, y, w, math.inf), fit_law(_IMAGES, b, y + b, w, -math.inf)
    words = _words(steps, [time.batch_size for time in known])
    return Critical(row, times, steps.parameter, steps.next, images.next, first.p, noise, words)


def _words(fit: Fit, batches: Sequence[int]) -> str:
    limits = fit.parameter
    if limits is None or (limits.low is None and limits.high is None):
        return "the steps don't determine the critical batch size"
    if limits.low is None and limits.high is not None:
        if limits.high <= batches[0]:
            return f"more devices help at none of the batch sizes tried; the critical one is {limits.text}"
        return f"beyond a batch size of {three_digits(limits.high)} at the latest, more devices help little"
    if limits.high is None and limits.low is not None:
        if limits.low >= batches[-1]:
            return f"more devices help at all batch sizes tried; the critical one is {limits.text}"
        return f"more devices help at least up to a batch size of {three_digits(limits.low)}"
    outside = "" if batches[0] <= limits.value <= batches[-1] else ", which is outside of the batch sizes tried"
    return (
        f"beyond a batch size of {limits.text}{outside}, more devices help little: "
        "there, training takes twice the fewest possible steps and twice the fewest images"
    )


def _text(found: Critical) -> str:
    lines = []
    for time in found.times:
        numbers = ["-", "-", "-"]
        if time.steps is not None:
            numbers = [f"{time.steps:,.0f}", f"{time.steps * time.batch_size:,.0f}", f"{time.deviation:.0%}"]
        lines.append([f"{time.batch_size:,}", *numbers, time.seeds])
    parts = [row_label(found.row), plain_table(["batch", "steps", "images", "error", "reached"], lines)]
    words = f"{found.words[0].upper()}{found.words[1:]}."
    if found.steps and found.images:
        words += f" Fewest steps: {found.steps.text}. Fewest images: {found.images.text}. Fit: p = {found.p:.2g}."
    if found.noise:
        words += f" Measured noise scale: {found.noise.text}."
    return "\n".join([*parts, words, *([found.parting.text] if found.parting else [])])


def _record(comparison: Comparison, times: TimeToTarget, rows: Sequence[Critical]) -> dict[str, Any]:
    return {
        "dataset": comparison.dataset, "model": comparison.model, "mode": comparison.mode,
        "target": times.goal._asdict(),
        "rows": [
            {
                "row": row_label(one.row), "optimizer": one.row.optimizer, "schedule": one.row.schedule,
                "batches": [_time_record(time) for time in one.times],
                "critical_batch": one.batch_size and one.batch_size.record(),
                "fewest_steps": one.steps and one.steps.record(),
                "fewest_images": one.images and one.images.record(),
                "p": one.p,
                "noise_scale": one.noise and one.noise.record(),
                "words": one.words,
                "parting": one.parting and one.parting.record(),
            }
            for one in rows
        ],
    }  # fmt: skip


def _time_record(time: Time) -> dict[str, Any]:
    images = time.steps and time.steps * time.batch_size
    return {"batch_size": time.batch_size, "steps": time.steps, "images": images, "deviation": time.deviation,
            "reached": time.seeds}  # fmt: skip
