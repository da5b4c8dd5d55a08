"""Export the comparison as Markdown, and the runs as one flat table for CSV and Parquet."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Sequence
from typing import Any

from largebatch.report.compare import REPORTED, Comparison, differing
from largebatch.report.fairness import warnings
from largebatch.report.load import Problem, Run
from largebatch.report.profiles import profiles, score_table
from largebatch.report.sensitivity import sensitivity_table
from largebatch.report.targets import TimeToTarget, reached_table
from largebatch.report.wording import answer, cell_accuracy, cell_counts, decimals, row_label, title

Record = dict[str, Any]

_METRICS = (
    "test/accuracy", "test/loss", "val/accuracy", "best/epoch", "best/val/accuracy", "best/test/accuracy",
    "images_per_second", "wall_seconds", "step",
)  # fmt: skip
_FACTS = ("precision", "device", "git_commit", "git_dirty")


def markdown(
    comparisons: Sequence[Comparison], problems: Sequence[Problem], times: Sequence[TimeToTarget | None] = ()
) -> str:
    """Return a section with answer, warnings and tables for each comparison, and a list of what is left out.

    Args:
        times: for each comparison, the training to its target, which gets tables too. Empty: no target.
    """
    parts = []
    for comparison, time in itertools.zip_longest(comparisons, times):
        warned = "\n".join(f"- **{_escaped(one.title)}.** {_escaped(one.text)}" for one in warnings(comparison))
        parts += [f"## {_escaped(title(comparison))}", _escaped(answer(comparison)), warned, table(comparison)]
        parts.append(_by_batch("points lost by another learning rate", comparison, sensitivity_table(comparison)))
        if time:
            parts.append(_by_batch(f"time to {time.goal.text}", comparison, reached_table(comparison, time)))
    if found := profiles(comparisons, times) if times else None:
        left_out = f"Left out: {', '.join(map(_escaped, found.left_out))}." if found.left_out else ""
        parts += ["## All workloads", left_out]
        lines = ["| AlgoPerf's score | by steps | by seconds | targets reached |", "|---|---|---|---|"]
        parts.append("\n".join([*lines, *(f"| {' | '.join(map(_escaped, line))} |" for line in score_table(found))]))
    if problems:
        parts.append("Left out:\n\n" + "\n".join(f"- {_escaped(f'{p.where}: {p.what}')}" for p in problems))
    return "\n\n".join(filter(None, parts)) + "\n"


def table(comparison: Comparison) -> str:
    """Return test accuracy in per cent by optimizer and batch size, as a Markdown table. Clear leaders are bold."""
    digits = decimals(comparison)
    lines = _head("test accuracy [%]", comparison)
    for row in comparison.rows:
        texts = []
        for batch in comparison.columns:
            cell = comparison.cells.get((row, batch))
            bold = "**" if cell in comparison.bold else ""
            texts.append(f"{bold}{cell_accuracy(cell, digits)}{bold} ({cell_counts(cell)})" if cell else "-")
        lines.append(f"| {_escaped(row_label(row))} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _by_batch(name: str, comparison: Comparison, cells: Sequence[Sequence[tuple[str, str]]]) -> str:
    """Return a table of pairs of texts, for each row and batch size. Empty without any pair."""
    lines = [
        f"| {_escaped(row_label(row))} | {' | '.join(_escaped('; '.join(filter(None, pair))) for pair in pairs)} |"
        for row, pairs in zip(comparison.rows, cells, strict=False)
    ]
    return "\n".join([*_head(name, comparison), *lines]) if lines else ""


def _head(name: str, comparison: Comparison) -> list[str]:
    sizes = " | ".join(f"batch {batch:,}" for batch in comparison.columns)
    return [f"| {name} | {sizes} |", "|---|" + "---|" * len(comparison.columns)]


def _escaped(text: str) -> str:
    """Escape text from run folders, as one line of plain text in Markdown."""
    return "".join(f"\\{c}" if c in "\\`*_|<>[]" else c for c in " ".join(text.split()))


def records(comparisons: Sequence[Comparison]) -> list[Record]:
    """Return one flat row for each run: its configuration, its outcome, and True if its setting was chosen.

    Each configuration key that differs between runs has a column of its own, under its dotted name.
    """
    keys = differing(run for comparison in comparisons for run in comparison.runs)
    found = []
    for cell in (cell for comparison in comparisons for cell in comparison.cells.values()):
        for setting in cell.settings:
            chosen = setting is cell.chosen
            reported = REPORTED[cell.chosen_by] if chosen else None
            for run in setting.runs:
                place = {"row": row_label(cell.row), "chosen": chosen, "reported": reported}
                found.append(_record(run) | place | {key: run.options.get(key) for key in keys})
    return _one_type_a_column(found)


def _record(run: Run) -> Record:
    config = run.config
    return {
        "run": run.name,
        **{group: config[group]["name"] for group in ("dataset", "model", "mode", "optimizer", "schedule")},
        "batch_size": config["batch_size"],
        "lr": float(config["optimizer"]["lr"]),
        "seed": config["seed"],
        "state": run.state,
        **{name: run.metric(name) for name in _METRICS},
        **{name: run.summary.get(name) for name in _FACTS},
        "message": run.message,
    }


def _one_type_a_column(rows: list[Record]) -> list[Record]:
    """Convert columns of several types to float or text, as Parquet needs."""
    for key in dict.fromkeys(key for row in rows for key in row):
        types = {type(row[key]) for row in rows if row[key] is not None}
        if len(types) == 1 and types <= {bool, int, float, str}:
            continue
        convert = float if types == {int, float} else str
        for row in rows:
            row[key] = None if row[key] is None else convert(row[key])
    return rows


def csv_text(rows: Sequence[Record]) -> str:
    """Return CSV with a heading. Unknown values are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
