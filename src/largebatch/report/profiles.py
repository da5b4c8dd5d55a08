"""Compute AlgoPerf's performance profiles and score: how often a row is within a factor of the fastest row.

AlgoPerf: arXiv 2306.07179, and the section Scoring of its documentation. Profiles: Dolan and Moré, arXiv cs/0102001.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from largebatch.report.cells import RowKey
from largebatch.report.compare import Comparison
from largebatch.report.curves import Progress
from largebatch.report.targets import TimeToTarget
from largebatch.report.wording import batches, row_label, title

MOST = 4.0  # AlgoPerf's upper limit of the factor tau
MEASURES = ("steps", "seconds")  # at one batch size, epochs and images have the same ratios as steps


class Profiles(NamedTuple):
    """Time to target of several rows relative to the fastest of them.

    Attributes:
        workloads: a text for each workload: data set, model, mode, batch size and target.
        ratios: for each measure and row, the time in each workload divided by the shortest time in it. Infinite if the
            row, or every row, never reached the target.
        left_out: a text for each row that has no result in some workload, with the number of these workloads.
    """

    workloads: list[str]
    ratios: dict[str, dict[RowKey, list[float]]]
    left_out: list[str]


def profiles(comparisons: Sequence[Comparison], times: Sequence[TimeToTarget | None]) -> Profiles | None:
    """Return the profiles over all workloads. None with fewer than two workloads, or two rows in all of them.

    A workload is a comparison at one batch size, because a row is compared with the others at equal batch size.
    """
    found: dict[str, dict[RowKey, Progress]] = {}
    for comparison, time in zip(comparisons, times, strict=True):
        if time is None:
            continue
        for batch in comparison.columns:
            medians = {row: cell.median for (row, size), cell in time.cells.items() if size == batch}
            known = {row: median for row, median in medians.items() if median is not None}
            if known:
                found[f"{title(comparison)}, batch {batches([batch])}: {time.goal.text}"] = known
    every = dict.fromkeys(row for comparison in comparisons for row in comparison.rows)
    missing = {row: sum(row not in known for known in found.values()) for row in every}
    rows = [row for row in every if not missing[row]]
    if len(found) < 2 or len(rows) < 2:
        return None
    ratios = {
        measure: relative([{row: getattr(known[row], measure) for row in rows} for known in found.values()])
        for measure in MEASURES
    }
    left_out = [f"{row_label(row)} (no result in {count} of {len(found)})" for row, count in missing.items() if count]
    return Profiles(list(found), ratios, left_out)


def relative(workloads: Sequence[Mapping[RowKey, float]]) -> dict[RowKey, list[float]]:
    """Return each row's time in each workload, divided by the shortest time in the workload.

    Args:
        workloads: the time of each row, in any unit. Infinite if the row never reached the target.
    """

    def ratio(time: float, fastest: float) -> float:
        if math.isinf(time):
            return math.inf
        if time == fastest:
            return 1.0  # also for 0: features that are good before training
        return time / fastest if fastest else math.inf

    rows = list(workloads[0])
    return {row: [ratio(times[row], min(times.values())) for times in workloads] for row in rows}


def profile(ratios: Sequence[float]) -> list[tuple[float, float]]:
    """Return the corners (tau, fraction of workloads with a ratio up to tau), for tau from 1 to ``MOST``."""
    taus = sorted({1.0, MOST, *(ratio for ratio in ratios if ratio <= MOST)})
    return [(tau, sum(ratio <= tau for ratio in ratios) / len(ratios)) for tau in taus]


def score(ratios: Sequence[float]) -> float:
    """Return AlgoPerf's score in 0..1: the integral of the profile over tau from 1 to ``MOST``, over ``MOST`` - 1."""
    return sum(max(MOST - ratio, 0.0) for ratio in ratios) / (MOST - 1) / len(ratios)


def score_table(found: Profiles) -> list[list[str]]:
    """Return a line for each row: its label, its score in each of ``MEASURES``, and how many targets it reached."""
    steps, seconds = (found.ratios[measure] for measure in MEASURES)
    return [
        [
            row_label(row),
            f"{score(steps[row]):.3f}",
            f"{score(seconds[row]):.3f}",
            f"{sum(not math.isinf(ratio) for ratio in steps[row])} of {len(found.workloads)}",
        ]
        for row in sorted(steps, key=lambda row: -score(steps[row]))
    ]
