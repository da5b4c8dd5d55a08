"""Read the gradient noise scale that runs with ``instruments.noise_scale=true`` have measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from largebatch.report.best_lr import Estimate
from largebatch.report.cells import Cell
from largebatch.report.load import Problem, number, read_history


def measured_noise(cells: Iterable[Cell], problems: list[Problem], epochs: float | None = None) -> Estimate | None:
    """Return the median noise scale in images, over the second half of the reported runs' training.

    The limits are medians too; the upper limit is None if most rows have none. None: no run has measured it.

    Args:
        epochs: end of a shorter training. None: the whole training.
    """
    rows = []
    for run in (run for cell in cells for run in cell.reported if run.state == "finished"):
        history = read_history(run, problems)
        end = epochs or max((row["epoch"] for row in history), default=0.0)
        for row in history:  # also the step that completes the last epoch
            if number(row.get("noise/scale")) and end / 2 < row["epoch"] < end + row["epoch"] / row["step"]:
                rows.append(row)
    if not rows:
        return None
    low, high = (
        statistics.median(limit if (limit := number(row.get(name))) is not None else missing for row in rows)
        for name, missing in (("noise/scale_low", 0.0), ("noise/scale_high", math.inf))
    )
    return Estimate(statistics.median(row["noise/scale"] for row in rows), low, None if math.isinf(high) else high)
