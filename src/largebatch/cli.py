"""The ``largebatch`` command: looking at runs. Training is started with ``python launch.py``."""

from __future__ import annotations

import argparse
import dataclasses
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
    _add_dashboard(commands)
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


def _add_dashboard(commands: Commands) -> None:
    dashboard = commands.add_parser("dashboard", help="write or update a W&B project's saved view and its report")
    dashboard.add_argument("--entity", required=True, help="W&B user or team")
    dashboard.add_argument("--project", default="largebatch", help="W&B project; default: largebatch")
    dashboard.add_argument("--name", default="large batch", help="of view and report; another name is another one")
    dashboard.add_argument("--runs", metavar="RUNS_DIR", type=Path, help="put these runs' table into the report")
    dashboard.add_argument("--print", action="store_true", help="print what would be saved as JSON; needs no network")
    dashboard.set_defaults(run=_dashboard)


def _dashboard(options: argparse.Namespace) -> int:
    try:
        import wandb_workspaces  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("dashboards need wandb-workspaces: pip install 'wandb-workspaces>=0.4.13,<0.5'") from None
    from largebatch.tracking import dashboard, dashboard_report, saved_view

    runs_dir = existing_folder(options.runs) if options.runs else None
    where = options.entity, options.project, options.name
    views = [
        saved_view.of_workspace(dashboard.workspace(*where)),
        saved_view.of_report(dashboard_report.report(*where, runs_dir)),
    ]
    if options.print:
        print(json.dumps([dataclasses.asdict(view) for view in views], indent=1))
        return 0
    for view, url in zip(views, saved_view.save(views), strict=True):
        print(f"{'workspace' if view.kind == 'project-view' else 'report'}: {url}")
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
