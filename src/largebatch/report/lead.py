"""Chart of each row's lead over a reference row against the batch size, and the lead's change per doubling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from largebatch.report.cells import Cell, RowKey
from largebatch.report.chart import Chart, Styles
from largebatch.report.compare import Comparison
from largebatch.report.figures import Point, by_batch
from largebatch.report.inference import FEWEST_SEEDS, LEVEL
from largebatch.report.wording import decimals, row_label

_REFERENCE = "adamw"
_NORMAL = float(special.ndtri(1 - LEVEL / 2))


class Lead(NamedTuple):
    """Difference in accuracy, in 0..1, of a cell to the reference's at the same batch size and seeds.

    ``half_width`` is that of its 95 % interval.
    """

    batch_size: int
    difference: float
    half_width: float


class Slope(NamedTuple):
    """Change of a lead per doubling of the batch size, in 0..1, and half the width of its 95 % interval."""

    change: float
    half_width: float


def lead_by_batch(comparison: Comparison, style: Styles) -> Chart | None:
    """Draw the leads over AdamW, or else over the first row. None without a lead at two or more batch sizes."""
    reference, leads = all_leads(comparison)
    if max(map(len, leads.values()), default=0) < 2:
        return None
    known = {(row, lead.batch_size): lead for row, of_row in leads.items() for lead in of_row}
    digits = decimals(comparison)

    def point(cell: Cell) -> Point | None:
        lead = known.get((cell.row, cell.batch_size))
        if lead is None:
            return None
        text = f"{100 * lead.difference:+.{digits}f} ± {100 * lead.half_width:.{digits}f} points"
        return 100 * lead.difference, 100 * lead.half_width, text

    changes = [
        f"{row_label(row)} {100 * found.change:+.{digits}f} ± {100 * found.half_width:.{digits}f}"
        for row, of_row in leads.items()
        if (found := slope(of_row)) is not None
    ]
    note = (
        f"Difference to {row_label(reference)} at equal seeds; bars are 95 % intervals of single differences, not "
        f"corrected for their number. Change per doubling of the batch, in points: {'; '.join(changes)}. The intervals "
        "count the scatter over seeds and the distance of the differences from a straight line."
    )
    name = row_label(reference)
    chart = by_batch(f"Lead over {name}", note, "lead [points of accuracy]", comparison, style, point)
    chart.figure.add_hline(y=0, line={"color": "#888", "width": 1})
    return chart


def all_leads(comparison: Comparison) -> tuple[RowKey, dict[RowKey, list[Lead]]]:
    """Return the reference, which is AdamW or else the first row, and the leads of all other rows."""
    reference = next((row for row in comparison.rows if row.optimizer == _REFERENCE), comparison.rows[0])
    return reference, {row: leads_of(comparison, row, reference) for row in comparison.rows if row != reference}


def leads_of(comparison: Comparison, row: RowKey, reference: RowKey) -> list[Lead]:
    """Return the row's leads at the batch sizes at which it shares enough seeds with the reference."""
    found = []
    for verdict in comparison.verdicts:
        own, other = (comparison.cells.get((one, verdict.batch_size)) for one in (row, reference))
        between = verdict.between(own, other) if own and other else None
        if between is not None and between.pair.seeds >= FEWEST_SEEDS:
            sign = 1 if between.first.row == row else -1
            found.append(Lead(verdict.batch_size, sign * between.pair.difference, between.pair.half_width()))
    return found


def slope(leads: Sequence[Lead]) -> Slope | None:
    """Return the weighted least-squares slope of the leads over log2 of the batch size. None with one batch size.

    Differences that fit no straight line widen the interval.
    """
    if len(leads) < 2:
        return None
    x = np.log2([float(lead.batch_size) for lead in leads])
    y = np.array([lead.difference for lead in leads])
    w = np.array([max(lead.half_width, 1e-9) for lead in leads]) ** -2.0 * _NORMAL**2
    x = x - float(w @ x / w.sum())
    spread = float(w @ x**2)
    change = float(w @ (x * y)) / spread
    misfit = float(w @ (y - float(w @ y / w.sum()) - change * x) ** 2) / max(len(leads) - 2, 1)
    widened = math.sqrt(max(misfit, 1.0)) if len(leads) > 2 else 1.0
    return Slope(change, _NORMAL * widened / math.sqrt(spread))
