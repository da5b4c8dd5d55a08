"""The ``largebatch`` command: looking at runs. Training is started with ``python launch.py``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from largebatch.errors import UserError
from largebatch.report.table import format_table, list_runs, run_row, run_rows

Commands = Any  # what argparse makes of add_subparsers has no public name


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="largebatch", description="Look at runs; `python launch.py` starts them.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_status(commands)
    _add_report(commands)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except UserError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who read what is said has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _add_status(commands: Commands) -> None:
    status = commands.add_parser("status", help="list the runs of a folder: state, step, test accuracy")
    status.add_argument("runs_dir", nargs="?", default="runs", type=Path, help="default: runs")
    status.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    status.set_defaults(run=_status)


def _status(options: argparse.Namespace) -> int:
    runs_dir = existing_folder(options.runs_dir)
    try:
        rows = run_rows(list_runs(runs_dir))
    except UserError as error:
        print(f"warning: states are without SLURM's view: {error}", file=sys.stderr)
        rows = [run_row(folder) for folder in list_runs(runs_dir)]
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    columns = {
        "run": "run",
        "state": "state",
        "step": "step",
        "steps": "of",
        "test/accuracy": "test",
        "job": "job",
        "message": "",
    }
    print(format_table(rows, columns) if rows else f"no runs in {runs_dir}")
    return 0


def _add_report(commands: Commands) -> None:
    report = commands.add_parser("report", help="compare the runs of a folder: a page, Markdown, CSV or Parquet")
    report.add_argument("runs_dir", nargs="?", default="runs", type=Path, help="default: runs")
    report.add_argument("--out", help="file to write, - to print; default: report.html, and md and csv are printed")
    report.add_argument(
        "--format", choices=("html", "md", "csv", "parquet"), help="default: by --out's ending, or html"
    )
    report.add_argument("--target", type=float, help="accuracy in 0..1 that the page counts the steps to")
    report.add_argument(
        "--by", action="append", default=[], metavar="KEY", help="a key whose values make rows of their own"
    )
    report.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from largebatch.report.build import report

    print(report(options.runs_dir, options.out, options.format, options.target, options.by))
    return 0


def existing_folder(runs_dir: Path) -> Path:
    """``runs_dir``, which is there.

    Raises:
        UserError: when it isn't.
    """
    if not runs_dir.is_dir():
        raise UserError(f"{runs_dir} is not a folder; give the folder that holds the runs")
    return runs_dir


if __name__ == "__main__":
    sys.exit(main())
