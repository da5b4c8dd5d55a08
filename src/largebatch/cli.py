"""The ``largebatch`` command: looking at runs. Training is started with ``python launch.py``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from largebatch.errors import UserError
from largebatch.report.table import format_table, list_runs, run_row, run_rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="largebatch", description="Look at runs; `python launch.py` starts them.")
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser("status", help="list the runs of a folder: state, step, test accuracy")
    status.add_argument("runs_dir", nargs="?", default="runs", type=Path, help="default: runs")
    status.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    options = parser.parse_args(arguments)
    return _status(options.runs_dir, options.json)


def _status(runs_dir: Path, as_json: bool) -> int:
    if not runs_dir.is_dir():
        print(f"error: {runs_dir} is not a folder; give the folder that holds the runs", file=sys.stderr)
        return 2
    try:
        rows = run_rows(list_runs(runs_dir))
    except UserError as error:
        print(f"warning: states are without SLURM's view: {error}", file=sys.stderr)
        rows = [run_row(folder) for folder in list_runs(runs_dir)]
    if as_json:
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


if __name__ == "__main__":
    sys.exit(main())
