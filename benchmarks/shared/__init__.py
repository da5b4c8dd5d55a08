"""Shared by the benchmarks: the option ``--smallest``, turns in alternation, quartiles and Markdown tables."""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Sequence
from typing import Any


def parsed(parser: argparse.ArgumentParser, **smallest: Any) -> argparse.Namespace:
    """Parse the command line; ``--smallest`` sets the options in ``smallest``."""
    parser.add_argument("--smallest", action="store_true", help="check that the benchmark runs; its times mean nothing")
    given = parser.parse_args()
    if given.smallest:
        vars(given).update(smallest)
    return given


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile; a single value three times."""
    return statistics.quantiles(values, method="inclusive") if len(values) > 1 else 3 * list(values)


def interleaved(turns: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each turn, after an uncounted turn."""
    for turn in turns.values():
        turn()
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    gc.disable()
    for repeat in range(repeats):
        for name in list(turns) if repeat % 2 == 0 else reversed(turns):
            seconds[name].append(turns[name]())
        gc.collect()
    gc.enable()
    return seconds


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> None:
    """Print a Markdown table and an empty line. The first ``left`` columns are aligned left, the others right."""
    cells = [list(headings), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    columns = list(zip(("<" if i < left else ">" for i in range(len(widths))), widths, strict=True))
    form = " | ".join(f"{{:{side}{width}}}" for side, width in columns)
    rule = "|".join("-" * (width + 1) + ("-" if side == "<" else ":") for side, width in columns)
    print(f"| {form.format(*cells[0])} |", f"|{rule}|", sep="\n")
    print(*(f"| {form.format(*row)} |" for row in cells[1:]), "", sep="\n", flush=True)
