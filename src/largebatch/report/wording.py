"""Words and numbers of the report: the same in the page, its charts and the Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from largebatch.config.modes import MODES
from largebatch.config.optimizer_libraries import PUBLISHED_NAMES
from largebatch.config.optimizers import OPTIMIZERS
from largebatch.config.schedules import SCHEDULES
from largebatch.report.cells import Cell, RowKey
from largebatch.report.compare import Comparison
from largebatch.report.load import Run

_SMALL_TEST_SET = 2000  # images; with fewer, one image changes a percentage by more than its second decimal


def row_label(row: RowKey) -> str:
    name = row.optimizer
    optimizer = OPTIMIZERS[name].label if name in OPTIMIZERS else PUBLISHED_NAMES.get(name, name)
    schedule = SCHEDULES[row.schedule].label if row.schedule in SCHEDULES else f", {row.schedule}"
    extra = "".join(f", {short(key)}={value}" for key, value in row.extra)
    return optimizer + schedule + extra


def short(key: str) -> str:
    """Return the last part of a dotted key."""
    return key.rpartition(".")[2]


def title(comparison: Comparison) -> str:
    return f"{comparison.dataset} · {comparison.model} · {MODES[comparison.mode].label}"


def decimals(comparison: Comparison) -> int:
    """Return the number of decimals of a percentage that the size of the test set justifies."""
    images = [run.metric("test_images") or 0 for run in comparison.runs if run.done]
    return 1 if images and max(images) < _SMALL_TEST_SET else 2


def cell_accuracy(cell: Cell, digits: int) -> str:
    """Return ``"97.1 ± 0.3"``, without the spread if there is one seed, or ``"diverged"`` if no run finished."""
    if cell.mean is None:
        return "diverged" if any(run.state == "diverged" for run in cell.reported or cell.runs) else "not finished"
    spread = f" ± {100 * cell.spread:.{digits}f}" if cell.spread is not None else ""
    return f"{100 * cell.mean:.{digits}f}{spread}"


def cell_counts(cell: Cell, comparison: Comparison | None = None) -> str:
    """Return ``"2 settings, 3 seeds, 1 diverged"``: trials, reported seeds, runs without a result.

    The text has ``unconfirmed`` if other cells of ``comparison`` are confirmed.
    """
    if cell.confirmed:
        lost = states(run for run in cell.reported if run.state != "finished")
        return ", ".join([plural(cell.trials, "setting"), plural(cell.seeds, "confirmation seed"), *lost])
    unfinished = sum(not run.done for run in cell.runs)
    elsewhere = " at other settings" if cell.chosen and not cell.chosen.diverged else ""
    counts = [
        plural(cell.trials, "setting"),
        plural(cell.seeds, "seed"),
        f"{cell.diverged} diverged{elsewhere}" if cell.diverged else "",
        f"{unfinished} not finished" if unfinished else "",
        "unconfirmed" if comparison and comparison.confirmed else "",
    ]
    return ", ".join(filter(None, counts))


def states(runs: Iterable[Run]) -> list[str]:
    """Return ``["1 diverged", "2 finished"]``."""
    return [f"{count} {state}" for state, count in sorted(Counter(run.state for run in runs).items())]


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(parts: Sequence[str]) -> str:
    """Return ``"a, b and c"``."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def batches(sizes: Iterable[int]) -> str:
    return listed([f"{size:,}" for size in sizes])


def value(option: Any) -> str:
    """Return a configuration's value as people write it."""
    if option is None:
        return "-"
    if isinstance(option, bool):
        return str(option).lower()  # as in YAML
    return f"{option:g}" if isinstance(option, float) else str(option)


def three_digits(number: float) -> str:
    """Return a number with three significant digits, without exponent up to 10^9: ``"1,380"``, ``"0.00757"``."""
    return f"{float(f'{number:.3g}'):,.9g}"
