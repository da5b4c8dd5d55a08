"""The comparison as Markdown, and the runs as one flat table for CSV and Parquet."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from largebatch.report.compare import REPORTED, Comparison, differing
from largebatch.report.fairness import warnings
from largebatch.report.load import Problem, Run
from largebatch.report.wording import answer, cell_counts, cell_figure, decimals, row_label, title
from largebatch.runs.metrics import write_table

Record = dict[str, Any]

_FIGURES = (
    "test/accuracy", "test/loss", "val/accuracy", "best/epoch", "best/val/accuracy", "best/test/accuracy",
    "images_per_second", "wall_seconds", "step",
)  # fmt: skip
_FACTS = ("precision", "device", "git_commit", "git_dirty")


def markdown(comparisons: Sequence[Comparison], problems: Sequence[Problem]) -> str:
    """A section with answer, warnings and table for each comparison, and what was left out."""
    parts = [_section(comparison) for comparison in comparisons]
    if problems:
        parts.append("Left out:\n\n" + "\n".join(f"- {_escaped(f'{p.where}: {p.what}')}" for p in problems))
    return "\n\n".join(parts) + "\n"


def _section(comparison: Comparison) -> str:
    warned = "\n".join(f"- **{_escaped(one.title)}.** {_escaped(one.text)}" for one in warnings(comparison))
    return "\n\n".join(
        filter(None, [f"## {_escaped(title(comparison))}", _escaped(answer(comparison)), warned, table(comparison)])
    )


def table(comparison: Comparison) -> str:
    """Test accuracy in per cent by optimizer and batch size, as a Markdown table; what leads clearly is bold."""
    digits = decimals(comparison)
    bold = {(lead.best.row, lead.batch_size) for lead in comparison.leads if lead.clear and lead.best}
    lines = [
        "| test accuracy [%] | " + " | ".join(f"batch {batch:,}" for batch in comparison.columns) + " |",
        "|---|" + "---|" * len(comparison.columns),
    ]
    for row in comparison.rows:
        said = []
        for batch in comparison.columns:
            cell = comparison.cells.get((row, batch))
            figure = cell_figure(cell, digits) if cell else "-"
            counts = f" ({cell_counts(cell)})" if cell else ""
            said.append((f"**{figure}**" if (row, batch) in bold else figure) + counts)
        lines.append(f"| {_escaped(row_label(row))} | {' | '.join(said)} |")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Text from run folders as plain text of one line in Markdown."""
    return "".join(f"\\{c}" if c in "\\`*_|<>[]" else c for c in " ".join(text.split()))


def records(comparisons: Iterable[Comparison]) -> list[Record]:
    """One flat row a run, whatever became of it: what it was, how it ended, and whether its setting was chosen.

    Keys of the configuration that differ between runs have columns of their own, under their dotted names.
    """
    comparisons = list(comparisons)
    keys = differing(run for comparison in comparisons for run in comparison.runs)
    found = []
    for comparison in comparisons:
        for row in comparison.rows:
            for batch in comparison.columns:
                cell = comparison.cells.get((row, batch))
                for setting in cell.settings if cell else ():
                    chosen = cell is not None and setting is cell.chosen
                    reported = REPORTED[cell.chosen_by] if cell and chosen else None
                    for run in setting.runs:
                        place = {"row": row_label(row), "chosen": chosen, "reported": reported}
                        found.append(_record(run) | place | {key: run.options.get(key) for key in keys})
    return _one_kind_a_column(found)


def _record(run: Run) -> Record:
    config = run.config
    return {
        "run": run.name,
        "dataset": config["dataset"]["name"],
        "model": config["model"]["name"],
        "mode": config["mode"]["name"],
        "optimizer": config["optimizer"]["name"],
        "schedule": config["schedule"]["name"],
        "batch_size": config["batch_size"],
        "lr": float(config["optimizer"]["lr"]),
        "seed": config["seed"],
        "state": run.state,
        **{name: run.figure(name) for name in _FIGURES},
        **{name: run.summary.get(name) for name in _FACTS},
        "message": run.message,
    }


def _one_kind_a_column(rows: list[Record]) -> list[Record]:
    """Columns of several types as text, so that a table can hold them."""
    for key in dict.fromkeys(key for row in rows for key in row):
        kinds = {type(row[key]) for row in rows if row[key] is not None}
        if kinds == {int, float}:
            kind: type = float
        elif len(kinds) == 1 and kinds <= {bool, int, float, str}:
            continue
        else:
            kind = str
        for row in rows:
            row[key] = None if row[key] is None else kind(row[key])
    return rows


def csv_text(rows: Sequence[Record]) -> str:
    """With a heading; what isn't known is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_parquet(rows: Sequence[Record], path: Path) -> None:
    write_table(list(rows), path)
