"""Choose what ``largebatch confirm`` runs: the chosen setting of each cell, and seeds that chose nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from largebatch.errors import UserError
from largebatch.report.build import compared, name_problems
from largebatch.report.load import Run, load_runs
from largebatch.report.wording import listed, plural, row_label, states


class Confirmation(NamedTuple):
    """Runs to confirm.

    Attributes:
        configs: frozen configuration of a run of each cell's chosen setting.
        seeds: the same for all cells.
        notes: sentences about the choice.
    """

    configs: list[Path]
    seeds: list[int]
    notes: list[str]


def confirmation(runs_dir: Path, count: int, by: Sequence[str] = ()) -> Confirmation:
    """Return the chosen setting of each cell of the report, with ``count`` seeds.

    Args:
        by: dotted configuration keys that make rows, as in the report.

    Raises:
        UserError: for an invalid count, folder or key, or if no run has finished.
    """
    if count < 1:
        raise UserError(f"--seeds={count}: too few. Allowed: 1 and more; an optimizer can be ahead with 3 and more")
    runs, problems = load_runs(runs_dir)
    name_problems(runs_dir, runs, problems)
    cells = [cell for comparison in compared(runs, by) for cell in comparison.cells.values()]
    chosen = [cell.chosen.finished[0].folder.config for cell in cells if cell.chosen]
    if not chosen:
        raise UserError(f"{runs_dir}: no run has finished, so no setting is chosen. Fix: finish the runs first")
    notes = []
    if nothing := [f"{row_label(cell.row)} at {cell.batch_size:,}" for cell in cells if not cell.chosen]:
        notes.append(f"Nothing to confirm for {listed(nothing)}: no run finished.")
    if unfinished := [run for run in runs if not run.done and not run.confirms]:
        counted = f"{plural(len(unfinished), 'run')} without a result ({listed(states(unfinished))})"
        notes.append(f"The choice may change: {counted}.")
    return Confirmation(chosen, fresh_seeds(runs, count), notes)


def fresh_seeds(runs: Iterable[Run], count: int) -> list[int]:
    """Return ``count`` seeds that no run but confirmation runs has used.

    First the seeds of earlier confirmation runs, so that a repeated command continues with them. Then the smallest
    numbers above all used seeds.
    """
    used: dict[bool, set[int]] = {False: set(), True: set()}
    for run in runs:
        used[run.confirms].add(run.config["seed"])
    earlier = sorted(used[True] - used[False])
    return list(itertools.islice(itertools.chain(earlier, itertools.count(max(used[True] | used[False]) + 1)), count))
