"""How the report names things and says numbers: the same words in the page, its charts and the Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from largebatch.report.compare import Cell, Comparison, Lead, RowKey

_OPTIMIZERS = {
    "lars": "LARS", "lamb": "LAMB", "tvlars": "TVLARS", "clars": "CLARS", "sgd": "SGD", "adam": "Adam",
    "adamw": "AdamW", "adagrad": "Adagrad", "rmsprop": "RMSprop",
}  # fmt: skip
_SCHEDULES = {"constant": "", "cosine": ", cosine", "warmup_cosine": " + warm-up", "warmup_poly": " + warm-up, poly"}
_MODES = {"clf": "classification", "bt": "Barlow Twins"}
_SMALL_TEST_SET = 2000  # images; below, one of them is more than the second decimal of a percentage


def row_label(row: RowKey) -> str:
    optimizer = _OPTIMIZERS.get(row.optimizer, row.optimizer)
    extra = "".join(f", {key.rpartition('.')[2]}={value}" for key, value in row.extra)
    return optimizer + _SCHEDULES.get(row.schedule, f", {row.schedule}") + extra


def title(comparison: Comparison) -> str:
    return f"{comparison.dataset} · {comparison.model} · {_MODES.get(comparison.mode, comparison.mode)}"


def decimals(comparison: Comparison) -> int:
    """Of a percentage: as many as the test set's size can tell."""
    images = [run.figure("test_images") or 0 for run in comparison.runs if run.done]
    return 1 if images and max(images) < _SMALL_TEST_SET else 2


def percent(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def cell_figure(cell: Cell, digits: int) -> str:
    """``"97.1 ± 0.3"``, without the spread where there is one seed, ``"diverged"`` where nothing finished."""
    if cell.mean is None:
        return "diverged" if cell.diverged else "not finished"
    spread = f" ± {percent(cell.spread, digits)}" if cell.spread is not None else ""
    return percent(cell.mean, digits) + spread


def cell_counts(cell: Cell) -> str:
    """``"2 settings, 3 seeds, 1 diverged"``: the trials, the chosen one's seeds, and what didn't finish."""
    unfinished = sum(not run.done for setting in cell.settings for run in setting.runs)
    elsewhere = (
        " at other settings" if cell.chosen and not cell.chosen.diverged else ""
    )  # than the setting that is shown
    counts = [
        plural(cell.trials, "setting"),
        plural(cell.seeds, "seed"),
        f"{cell.diverged} diverged{elsewhere}" if cell.diverged else "",
        f"{unfinished} not finished" if unfinished else "",
    ]
    return ", ".join(filter(None, counts))


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(parts: Sequence[str]) -> str:
    """``"a, b and c"``."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]])) if parts else ""


def batches(sizes: Iterable[int]) -> str:
    return listed([f"{size:,}" for size in sizes])


def value(option: Any) -> str:
    """A configuration's value as people write it."""
    if option is None:
        return "-"
    if isinstance(option, bool):
        return str(option).lower()  # as in YAML
    return f"{option:g}" if isinstance(option, float) else str(option)


def answer(comparison: Comparison) -> str:
    """What the comparison says, in one or two sentences."""
    digits = decimals(comparison)
    clear = [
        f"at batch {lead.batch_size:,} {row_label(lead.best.row)} leads with {cell_figure(lead.best, digits)} %, "
        f"n = {lead.best.seeds} (next: {row_label(lead.runner_up.row)}, {cell_figure(lead.runner_up, digits)} %)"
        for lead in comparison.leads
        if lead.clear and lead.best and lead.runner_up
    ]
    parts = ["; ".join(clear)]
    open_leads = [lead for lead in comparison.leads if not lead.clear]
    compared = [lead for lead in open_leads if lead.runner_up]
    spread_known = [lead for lead in compared if all(c.spread is not None for c in _finished(comparison, lead))]
    unknown = [lead for lead in compared if lead not in spread_known]
    if spread_known:
        parts.append(
            f"at {_batch_word(spread_known)} no optimizer is ahead beyond the spread "
            f"(highest mean{'s' if len(spread_known) > 1 else ''}: {_highest(spread_known, digits)})"
        )
    if unknown:
        parts.append(
            f"at {_batch_word(unknown)} nobody can be called ahead, because an optimizer has a single seed and so no "
            f"spread (highest: {_highest(unknown, digits)})"
        )
    alone = [lead for lead in open_leads if lead.best and not lead.runner_up]
    if alone:
        parts.append(f"at {_batch_word(alone)} only one optimizer has a result ({_highest(alone, digits)})")
    nothing = [lead for lead in open_leads if not lead.best]
    if nothing:
        parts.append(f"at {_batch_word(nothing)} no run has finished, or all diverged")
    sentences = [part[0].upper() + part[1:] + "." for part in parts if part]
    return " ".join(sentences)


def _finished(comparison: Comparison, lead: Lead) -> list[Cell]:
    return [cell for cell in comparison.column(lead.batch_size) if cell.mean is not None]


def _batch_word(leads: Sequence[Lead]) -> str:
    return f"batch {batches(lead.batch_size for lead in leads)}"


def _highest(leads: Sequence[Lead], digits: int) -> str:
    said = [f"{row_label(lead.best.row)} {cell_figure(lead.best, digits)} %" for lead in leads if lead.best]
    if len(leads) == 1:
        return said[0]
    return ", ".join(f"{words} at {lead.batch_size:,}" for words, lead in zip(said, leads, strict=True))
