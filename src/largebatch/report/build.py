"""``largebatch report``: a folder of runs as a page, as Markdown, or as one table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from largebatch.errors import UserError, choices
from largebatch.report import export
from largebatch.report.compare import Comparison, compare
from largebatch.report.load import Problem, Run, load_runs
from largebatch.runs.folder import write_atomic

FORMATS = ("html", "md", "csv", "parquet")
_PRINTED = ("md", "csv")  # to the terminal, unless a file is named


def report(
    runs_dir: Path, out: str | None = None, format_: str | None = None, target: float | None = None,
    by: Sequence[str] = (),
) -> str:  # fmt: skip
    """Write the report of ``runs_dir``.

    Args:
        out: the file; ``-`` prints. None prints Markdown and CSV and writes ``report.html`` or ``report.parquet``.
        format_: of ``FORMATS``; None: by the ending of ``out``, else HTML.
        target: the accuracy in 0..1 that steps to are reported in the page.
        by: dotted keys that make rows of their own.

    Returns:
        What is to be printed: the report itself, or where it is.

    Raises:
        UserError: for a target, format, place or key that can't be, and where there is no run at all.
    """
    if target is not None and not 0 < target < 1:
        raise UserError(f"--target {target:g}: allowed are accuracies between 0 and 1, such as 0.9 for 90 %")
    if not runs_dir.is_dir():
        raise UserError(f"{runs_dir} is not a folder; give the folder that holds the runs")
    kind = format_ or _format_of(out)
    path = _place(out, kind)
    runs, problems = load_runs(runs_dir)
    known = sorted({key for run in runs for key in run.given}) if by else []
    for key in by:
        if runs and key not in known:
            raise UserError(f"--by {key}: no run sets such a key; {choices(key, known)}")
    comparisons = compare(runs, by)
    text = _text(kind, runs_dir, runs, problems, comparisons, target) if runs else ""
    for problem in sorted(set(problems), key=lambda one: (one.where, one.what)):
        print(f"left out: {problem.where}: {problem.what}", file=sys.stderr)
    if not runs:
        raise UserError(f"{runs_dir} holds no run that can be read; give the folder that holds the runs")
    if path is None:
        return text.rstrip("\n")
    try:
        if kind == "parquet":
            export.write_parquet(export.records(comparisons), path)
        else:
            write_atomic(path, text)
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}; name a file that can be written") from None
    return f"{path}: {len(runs)} runs in {len(comparisons)} comparison(s)"


def _text(
    kind: str, runs_dir: Path, runs: list[Run], problems: list[Problem], comparisons: list[Comparison],
    target: float | None,
) -> str:  # fmt: skip
    if kind == "html":
        from largebatch.report.page import page  # Plotly and Jinja2, which the other formats don't need

        return page(runs_dir.resolve().name, runs, problems, comparisons, target)
    if kind == "md":
        return export.markdown(comparisons, problems)
    return export.csv_text(export.records(comparisons)) if kind == "csv" else ""


def _place(out: str | None, kind: str) -> Path | None:
    """The file to write; None is the terminal."""
    if out == "-" or (out is None and kind in _PRINTED):
        if kind == "parquet":
            raise UserError("--format parquet --out -: Parquet isn't for a terminal; name a file")
        return None
    path = Path(out or f"report.{kind}")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UserError(f"--out {path}: is a folder; name a file in it")
    return path


def _format_of(out: str | None) -> str:
    if out is None or out == "-":
        return "html"
    ending = Path(out).suffix.lstrip(".").lower()
    kind = {"htm": "html", "markdown": "md"}.get(ending, ending)
    if kind not in FORMATS:
        raise UserError(
            f"--out {out}: its ending says no format; end it in .html, .md, .csv or .parquet, or add --format"
        )
    return kind
