"""The ``largebatch`` command: looking at runs. Training is started with ``python launch.py``."""

from __future__ import annotations

import argparse
import functools
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
    _add_sync(commands)
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


def _add_sync(commands: Commands) -> None:
    sync = commands.add_parser("sync", help="upload what W&B lacks of the runs of a folder")
    sync.add_argument("runs_dir", nargs="?", default="runs", type=Path, help="default: runs")
    sync.add_argument("prefixes", nargs="*", metavar="RUN_PREFIX", help="only runs whose names begin with one of these")
    sync.add_argument("--dry-run", action="store_true", help="say what would be uploaded; needs no key and no network")
    sync.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="for one part; default: 600")
    sync.set_defaults(run=_sync)


def _sync(options: argparse.Namespace) -> int:
    from largebatch.tracking.sync import sync

    runs_dir = existing_folder(options.runs_dir)
    say = functools.partial(print, flush=True)
    return 1 if sync(runs_dir, options.prefixes, options.dry_run, say, options.timeout) else 0


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
