"""Words and numbers of the report: the same in the page, its charts and the Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from largebatch.config.modes import MODES
from largebatch.config.optimizers import OPTIMIZERS
from largebatch.config.schedules import SCHEDULES
from largebatch.report.compare import Cell, Comparison, Lead, RowKey
from largebatch.report.load import Run

_SMALL_TEST_SET = 2000  # images; with fewer, one image changes a percentage by more than its second decimal


def row_label(row: RowKey) -> str:
    optimizer = OPTIMIZERS[row.optimizer].label if row.optimizer in OPTIMIZERS else row.optimizer
    schedule = SCHEDULES[row.schedule].label if row.schedule in SCHEDULES else f", {row.schedule}"
    extra = "".join(f", {short(key)}={value}" for key, value in row.extra)
    return optimizer + schedule + extra


def short(key: str) -> str:
    """Return the last part of a dotted key."""
    return key.rpartition(".")[2]


def title(comparison: Comparison) -> str:
    return f"{comparison.dataset} · {comparison.model} · {MODES[comparison.mode].label}"


def decimals(comparison: Comparison) -> int:
    """Return the number of decimals of a percentage that the test set is large enough for."""
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


def answer(comparison: Comparison) -> str:
    """Return the result of the comparison in one or two sentences."""
    digits = decimals(comparison)
    clear = [
        f"at batch {lead.batch_size:,} {row_label(lead.best.row)} leads with {cell_accuracy(lead.best, digits)} %, "
        f"n = {lead.best.seeds} (next: {row_label(lead.runner_up.row)}, {cell_accuracy(lead.runner_up, digits)} %)"
        for lead in comparison.leads
        if lead.clear and lead.best and lead.runner_up
    ]
    parts = ["; ".join(clear)]
    open_leads = [lead for lead in comparison.leads if not lead.clear]
    no_spread = {cell.batch_size for cell in comparison.finished if cell.spread is None}
    compared = [lead for lead in open_leads if lead.runner_up]
    if known := [lead for lead in compared if lead.batch_size not in no_spread]:
        parts.append(
            f"at {_batch_word(known)} no optimizer is ahead beyond the spread "
            f"(highest mean{'s' if len(known) > 1 else ''}: {_highest(known, digits)})"
        )
    if unknown := [lead for lead in compared if lead.batch_size in no_spread]:
        parts.append(
            f"at {_batch_word(unknown)} no leader can be named, because an optimizer has only one seed and so no "
            f"spread (highest mean{'s' if len(unknown) > 1 else ''}: {_highest(unknown, digits)})"
        )
    if alone := [lead for lead in open_leads if lead.best and not lead.runner_up]:
        parts.append(f"at {_batch_word(alone)} only one optimizer has a result ({_highest(alone, digits)})")
    if nothing := [lead for lead in open_leads if not lead.best]:
        parts.append(f"at {_batch_word(nothing)} every run diverged or has not finished")
    return " ".join(part[0].upper() + part[1:] + "." for part in parts if part)


def _batch_word(leads: Sequence[Lead]) -> str:
    return f"batch {batches(lead.batch_size for lead in leads)}"


def _highest(leads: Sequence[Lead], digits: int) -> str:
    best = [(lead, f"{row_label(lead.best.row)} {cell_accuracy(lead.best, digits)} %") for lead in leads if lead.best]
    return best[0][1] if len(leads) == 1 else ", ".join(f"{words} at {lead.batch_size:,}" for lead, words in best)
