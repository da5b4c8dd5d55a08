"""``largebatch report``: write a folder of runs as a page, as Markdown or as one table."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from largebatch.errors import UserError, choices
from largebatch.report import export
from largebatch.report.compare import compare
from largebatch.report.curves import read_histories
from largebatch.report.load import load_runs
from largebatch.report.targets import TARGET_METRICS, Target, time_to_target
from largebatch.runs.folder import write_atomic
from largebatch.runs.metrics import write_table

FORMATS = ("html", "md", "csv", "parquet")
_DEFAULT = Target()


def report(
    runs_dir: Path, out: str | None = None, format_: str | None = None, target: Target = _DEFAULT,
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
    _check(target)
    if not runs_dir.is_dir():
        raise UserError(f"{runs_dir}: not a folder. Fix: give the folder that holds the runs")
    kind = format_ or _format_of(out)
    path = _path(out, kind)
    runs, problems = load_runs(runs_dir)
    known = sorted({key for run in runs for key in run.given}) if by else []
    for key in by:
        if runs and key not in known:
            raise UserError(f"--by={key}: no run has this key; {choices(key, known)}")
    comparisons = compare(runs, by)
    text = ""
    if kind == "html" and runs:
        from largebatch.report.page import page  # imports Plotly and Jinja2, which the other formats don't need

        text = page(runs_dir.resolve().name, runs, problems, comparisons, target)
    elif kind == "md":
        histories = [read_histories(comparison, problems) for comparison in comparisons if target.value]
        times = [time_to_target(*pair, target) for pair in zip(comparisons, histories, strict=False)]
        text = export.markdown(comparisons, problems, times)
    for problem in sorted(set(problems)):
        print(f"left out: {problem.where}: {problem.what}", file=sys.stderr)
    if not runs:
        raise UserError(f"{runs_dir}: holds no readable run. Fix: give the folder that holds the runs")
    if kind == "csv":
        text = export.csv_text(export.records(comparisons))
    if path is None:
        return text.rstrip("\n")
    try:
        if kind == "parquet":
            write_table(export.records(comparisons), path)
        else:
            write_atomic(path, text)
    except OSError as error:
        raise UserError(f"--out={path}: {error.strerror}. Fix: name a file that can be written") from None
    return f"{path}: {len(runs)} runs in {len(comparisons)} comparison(s)"


def _check(target: Target) -> None:
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


def _path(out: str | None, kind: str) -> Path | None:
    """Return the file to write. None: print."""
    if out == "-" or (out is None and kind in ("md", "csv")):
        if kind == "parquet":
            raise UserError("--format=parquet --out=-: Parquet can't be printed. Fix: name a file")
        return None
    path = Path(out or f"report.{kind}")
    if not path.parent.is_dir():
        raise UserError(f"--out={path}: there is no folder {path.parent}. Fix: create it or name another file")
    if path.is_dir():
        raise UserError(f"--out={path}: is a folder. Fix: name a file in it")
    return path


def _format_of(out: str | None) -> str:
    if out is None or out == "-":
        return "html"
    ending = Path(out).suffix.lstrip(".").lower()
    kind = {"htm": "html", "markdown": "md"}.get(ending, ending)
    if kind not in FORMATS:
        raise UserError(
            f"--out={out}: unknown ending. Allowed: .html, .md, .csv, .parquet. Fix: rename the file or add --format"
        )
    return kind
