"""Sentences and tables that tell readers the verdicts of a comparison."""

from __future__ import annotations

from collections.abc import Sequence

from largebatch.report.cells import Cell
from largebatch.report.compare import Comparison
from largebatch.report.inference import FEWEST_SEEDS, POWER
from largebatch.report.verdict import Difference, Verdict
from largebatch.report.wording import cell_accuracy, decimals, listed, plural, row_label


def answer(comparison: Comparison) -> str:
    """Return the verdict on every column, a line for each."""
    digits = decimals(comparison)
    return "\n".join(_sentences(verdict, digits) for verdict in comparison.verdicts)


def _sentences(verdict: Verdict, digits: int) -> str:
    at, best = f"At batch {verdict.batch_size:,}", verdict.leader or verdict.best
    if best is None:
        return f"{at} every run diverged or has not finished."
    name, mean = row_label(best.row), f"{cell_accuracy(best, digits)} %"
    others = [cell for cell in verdict.ranked if cell is not best]
    if not others:
        return f"{at} only {name} has a result ({mean})."
    if verdict.leader:
        nearest = verdict.between(best, others[0])
        assert nearest is not None
        where = "" if best is verdict.best else " at their common seeds"
        return (
            f"{at} {name} is ahead of {_others(others)}{where} ({probability(verdict.p)}): {mean}, "
            f"{interval(nearest, digits, best)} above {row_label(others[0].row)}."
        )
    differences = {other.row: verdict.between(best, other) for other in others}
    tested = [d for d in differences.values() if d is not None and d.p is not None]
    open_ = [d for d in tested if not d.ahead]
    sentences = [f"{at} {name} has the highest mean ({mean})"]
    if open_:
        sentences[0] += f", and isn't told apart from {listed([_other(d, best) for d in open_])}"
        nearest = open_[0]
        sentences.append(
            f"The difference to {_other(nearest, best)} is {interval(nearest, digits, best)}; "
            f"{shown(nearest, verdict, digits)}"
        )
    if beaten := [_other(d, best) for d in tested if d.ahead and d.first is best]:
        sentences.append(f"It is ahead of {listed(beaten)}")
    if better := [_other(d, best) for d in tested if d.ahead and d.first is not best]:
        sentences.append(f"At the common seeds, {listed(better)} is ahead of it")
    if not best.complete:
        sentences.append("It can't be ahead, because one of its seeds diverged or didn't finish")
    few = [row_label(other.row) for other in others if (d := differences[other.row]) is None or _has_few_seeds(d)]
    if len(few) == len(others) > 1:
        sentences.append(f"Too few seeds to say if it is ahead: {FEWEST_SEEDS} common seeds are needed")
    elif few:
        sentences.append(
            f"Too few seeds to say if it is ahead of {listed(few)}: {FEWEST_SEEDS} common seeds are needed"
        )
    return ". ".join(sentences) + "."


def _others(others: Sequence[Cell]) -> str:
    return row_label(others[0].row) if len(others) == 1 else f"all {len(others)} others"


def _other(difference: Difference, cell: Cell) -> str:
    return row_label((difference.second if difference.first is cell else difference.first).row)


def _has_few_seeds(difference: Difference) -> bool:
    return difference.pair.seeds < FEWEST_SEEDS


def probability(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def interval(difference: Difference, digits: int, cell: Cell) -> str:
    """Return ``"1.2 points [0.7, 1.7]"``: accuracy of ``cell`` minus that of the other, with the 95 % interval."""
    sign = 1 if difference.first is cell else -1
    mean, half = 100 * sign * difference.pair.difference, 100 * difference.pair.half_width()
    return f"{mean:.{digits}f} points [{mean - half:.{digits}f}, {mean + half:.{digits}f}]"


def shown(difference: Difference, verdict: Verdict, digits: int) -> str:
    """Return the difference that these seeds show, and the number of seeds that would show the observed one."""
    pair = difference.pair
    level = verdict.level / difference.first.choices
    smallest = f"{100 * pair.smallest_shown(level):.{digits}f}"
    more = pair.seeds_to_settle(level)
    settle = (
        f"about {plural(more - pair.seeds, 'more seed')} would settle it" if more else "no number of seeds settles it"
    )
    return f"{plural(pair.seeds, 'seed')} show one of {smallest} points in {100 * POWER:.0f} of 100 cases, and {settle}"


def differences_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return heads and lines: every pair of every batch size."""
    digits = decimals(comparison)
    heads = ["batch", "optimizers", "common seeds", "difference [95 % interval]", "p", "", "to settle it"]
    lines = [
        [
            f"{verdict.batch_size:,}",
            f"{row_label(difference.first.row)} - {row_label(difference.second.row)}",
            str(difference.pair.seeds),
            interval(difference, digits, difference.first),
            "-" if difference.p is None else probability(difference.p).removeprefix("p ").removeprefix("= "),
            _word(difference),
            "" if difference.ahead or difference.p is None else shown(difference, verdict, digits),
        ]
        for verdict in comparison.verdicts
        for difference in verdict.differences
    ]
    return heads, lines


def _word(difference: Difference) -> str:
    if difference.p is None:
        return "too few seeds" if _has_few_seeds(difference) else "seeds are missing"
    return "ahead" if difference.ahead else "not told apart"
