"""``largebatch report``: write a folder of runs as a page, as Markdown or as one table."""

from __future__ import annotations

import csv
import io
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from largebatch.errors import UserError, choices
from largebatch.report.answer import answer
from largebatch.report.cells import differing
from largebatch.report.compare import Comparison, compare
from largebatch.report.curves import read_histories
from largebatch.report.fairness import warnings
from largebatch.report.load import Problem, Run, load_runs
from largebatch.report.profiles import profiles, score_table
from largebatch.report.sensitivity import sensitivity_table
from largebatch.report.targets import TARGET_METRICS, Target, TimeToTarget, reached_table, time_to_target
from largebatch.report.wording import cell_accuracy, cell_counts, decimals, row_label, title
from largebatch.runs.folder import write_atomic
from largebatch.runs.metrics import write_table
from largebatch.terminal import printable

FORMATS = ("html", "md", "csv", "parquet")
_NO_TARGET = Target()

Record = dict[str, Any]

_METRICS = (
    "test/accuracy", "test/loss", "val/accuracy", "best/epoch", "best/val/accuracy", "best/test/accuracy",
    "images_per_second", "wall_seconds", "step",
)  # fmt: skip
_FACTS = ("precision", "device", "git_commit", "git_dirty")


def report(
    runs_dir: Path, out: str | None = None, format_: str | None = None, target: Target = _NO_TARGET,
    by: Sequence[str] = (),
) -> str:  # fmt: skip
    """Write the report of ``runs_dir``.

    Args:
        out: file to write; ``-`` prints. None prints Markdown and CSV, and writes ``report.html`` or
            ``report.parquet``.
        format_: one of ``FORMATS``. None: by the ending of ``out``, else HTML.
        target: the page, and Markdown if the target has a value, show the training to it.
        by: dotted configuration keys. Each of their values gets its own row.

    Returns:
        Text to print: the report, or the path that it was written to.

    Raises:
        UserError: for an invalid target, format, path or key, and for a folder without a readable run.
    """
    check_target(target)
    kind, path = _output(out, format_)
    runs, problems = load_runs(runs_dir)
    comparisons = compared(runs, by)
    text = ""
    if kind == "html" and runs:
        from largebatch.report.page import page  # imports Plotly and Jinja2, which the other formats don't need

        folder = path.resolve().parent if path else Path.cwd()
        text = page(runs_dir.resolve().name, runs, problems, comparisons, target, folder)
    elif kind == "md":
        times = [time_to_target(one, read_histories(one, problems), target) for one in comparisons if target.value]
        text = printable(_markdown(comparisons, problems, times))
    name_problems(runs_dir, runs, problems)
    if kind == "csv":
        text = _csv(records(comparisons))
    if path is None:
        return text.rstrip("\n")
    try:
        if kind == "parquet":
            write_table(records(comparisons), path)
        else:
            write_atomic(path, text)
    except OSError as error:
        raise UserError(f"--out={path}: {error.strerror}. Fix: name a file that can be written") from None
    return f"{path}: {len(runs)} runs in {len(comparisons)} comparison(s)"


def check_target(target: Target) -> None:
    """Raise a ``UserError`` if no run can have such a metric or value."""
    value, metric = target
    if metric is not None and metric not in TARGET_METRICS:
        raise UserError(f"--target-metric={metric}: unknown metric; {choices(metric, TARGET_METRICS)}")
    if metric is not None and metric.endswith("loss"):
        if value is None:
            raise UserError(f"--target-metric={metric}: no loss given. Fix: add --target, such as --target 0.5")
        if not 0 < value < math.inf:
            raise UserError(f"--target={value:g}: not a loss. Allowed: numbers above 0")
    elif value is not None and not 0 < value < 1:
        raise UserError(f"--target={value:g}: not an accuracy. Allowed: numbers between 0 and 1, such as 0.9 for 90 %")


def compared(runs: Sequence[Run], by: Sequence[str]) -> list[Comparison]:
    """Return ``compare(runs, by)``.

    Raises:
        UserError: no run has a key of ``by``.
    """
    known = sorted({key for run in runs for key in run.given}) if by else []
    for key in by:
        if runs and key not in known:
            raise UserError(f"--by={key}: no run has this key; {choices(key, known)}")
    return compare(runs, by)


def name_problems(runs_dir: Path, runs: Sequence[Run], problems: Sequence[Problem]) -> None:
    """Print the problems to stderr.

    Raises:
        UserError: there is no run.
    """
    for problem in sorted(set(problems)):
        print(printable(f"left out: {problem.where}: {problem.what}"), file=sys.stderr)
    if not runs:
        raise UserError(f"{runs_dir}: holds no readable run. Fix: give the folder that holds the runs")


def _output(out: str | None, format_: str | None) -> tuple[str, Path | None]:
    """Return the format, and the file to write. None: print."""
    name = "report.html" if out is None or out == "-" else out
    ending = Path(name).suffix.lstrip(".").lower()
    kind = format_ or {"htm": "html", "markdown": "md"}.get(ending, ending)
    if kind not in FORMATS:
        raise UserError(
            f"--out={out}: unknown ending. Allowed: .html, .md, .csv, .parquet. Fix: rename the file or add --format"
        )
    if out == "-" or (out is None and kind in ("md", "csv")):
        if kind == "parquet":
            raise UserError("--format=parquet --out=-: Parquet can't be printed. Fix: name a file")
        return kind, None
    path = Path(out or f"report.{kind}")
    if not path.parent.is_dir():
        raise UserError(f"--out={path}: there is no folder {path.parent}. Fix: create it or name another file")
    if path.is_dir():
        raise UserError(f"--out={path}: is a folder. Fix: name a file in it")
    return kind, path


def _markdown(
    comparisons: Sequence[Comparison], problems: Sequence[Problem], times: Sequence[TimeToTarget | None]
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
    """Return test accuracy in per cent by optimizer and batch size, as a Markdown table. Clear leaders are bold.

    Counts that are the same in all cells are below the table.
    """
    digits = decimals(comparison)
    counts = {key: cell_counts(cell, comparison) for key, cell in comparison.cells.items()}
    same = len(counts) > 1 and len(set(counts.values())) == 1
    lines = _head("test accuracy [%]", comparison)
    for row in comparison.rows:
        texts = []
        for batch in comparison.columns:
            cell = comparison.cells.get((row, batch))
            bold = "**" if cell in comparison.bold else ""
            small = "" if same else f" ({counts[row, batch]})" if cell else ""
            texts.append(f"{bold}{cell_accuracy(cell, digits)}{bold}{small}" if cell else "-")
        lines.append(f"| {_escaped(row_label(row))} | {' | '.join(texts)} |")
    below = ["", f"Each cell: {min(counts.values())}."] if same else []
    return "\n".join(lines + below)


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
    """Return one flat row for each run: its configuration, its outcome, and its part in the table.

    Each configuration key that differs between runs has a column of its own, under its dotted name.
    """
    keys = differing(run for comparison in comparisons for run in comparison.runs)
    found: list[Record] = []
    for cell in (cell for comparison in comparisons for cell in comparison.cells.values()):
        for setting in cell.settings:
            chosen = setting is cell.chosen
            for run in (*setting.runs, *setting.confirming):
                config = run.config
                record = {
                    "run": run.name,
                    **{group: config[group]["name"] for group in ("dataset", "model", "mode", "optimizer", "schedule")},
                    "batch_size": config["batch_size"],
                    "lr": float(config["optimizer"]["lr"]),
                    "seed": config["seed"],
                    "state": run.state,
                    **{name: run.metric(name) for name in _METRICS},
                    **{name: run.summary.get(name) for name in _FACTS},
                    "message": run.message,
                    "row": row_label(cell.row),
                    "chosen": chosen,
                    "confirms": run.confirms,
                    "reported": cell.metric if run in cell.reported else None,
                    **{key: run.options.get(key) for key in keys},
                }
                found.append(record)
    for key in found[0]:  # Parquet needs one type for each column
        types = {type(record[key]) for record in found if record[key] is not None}
        if len(types) > 1 or not types <= {bool, int, float, str}:
            convert = float if types == {int, float} else str
            for record in found:
                record[key] = None if record[key] is None else convert(record[key])
    return found


def _csv(rows: Sequence[Record]) -> str:
    """Return CSV with a heading. Unknown values are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
