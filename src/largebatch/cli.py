"""The ``largebatch`` command shows, cancels and compares runs. ``python launch.py`` starts them."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

from largebatch.errors import UserError
from largebatch.runs.folder import RunFolder
from largebatch.runs.table import find_run, find_runs

Commands = Any  # argparse has no public name for the type of add_subparsers()
_RUN = "a run's folder, or the beginning of its name or last eight digits"


def main(arguments: list[str] | None = None) -> int:
    description = "Show and cancel runs; `python launch.py` starts them."
    parser = argparse.ArgumentParser(prog="largebatch", description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_status(commands)
    _add_logs(commands)
    _add_cancel(commands)
    _add_report(commands)
    _add_dashboard(commands)
    _add_sync(commands)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except UserError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _add_status(commands: Commands) -> None:
    status = commands.add_parser("status", help="show states, steps, test accuracies, jobs and last log lines")
    _add_runs(status)
    status.add_argument("--json", action="store_true", help="print a JSON list instead of the table")
    status.add_argument("--watch", action="store_true", help="update until no run is queued or running")
    status.set_defaults(run=_status)


def _status(options: argparse.Namespace) -> int:
    from largebatch.runs.watch import show_status, watch_status

    if options.watch:
        watch_status(lambda: _named(options))
    else:
        show_status(_named(options), as_json=options.json)
    return 0


def _add_dashboard(commands: Commands) -> None:
    dashboard = commands.add_parser("dashboard", help="write or update a W&B project's saved view and its report")
    dashboard.add_argument("--entity", required=True, help="W&B user or team")
    dashboard.add_argument("--project", default="largebatch", help="W&B project; default: largebatch")
    dashboard.add_argument("--name", default="large batch", help="name of view and report; each name has its own")
    dashboard.add_argument("--runs", metavar="RUNS_DIR", type=Path, help="add a table of these runs to the report")
    dashboard.add_argument("--print", action="store_true", help="print view and report as JSON; needs no network")
    dashboard.set_defaults(run=_dashboard)


def _dashboard(options: argparse.Namespace) -> int:
    try:
        import wandb_workspaces  # noqa: F401
    except ModuleNotFoundError:
        problem = "wandb-workspaces is missing. Fix: pip install 'wandb-workspaces>=0.4.13,<0.5'"
        raise UserError(f"dashboard: {problem}") from None
    from largebatch.report import dashboard, dashboard_report, saved_view

    where = options.entity, options.project, options.name
    views = [
        saved_view.of_workspace(dashboard.workspace(*where)),
        saved_view.of_report(dashboard_report.report(*where, options.runs)),
    ]
    if options.print:
        print(json.dumps([dataclasses.asdict(view) for view in views], indent=1))
        return 0
    for view, url in zip(views, saved_view.save(views), strict=True):
        print(f"{'workspace' if view.kind == 'project-view' else 'report'}: {url}")
    return 0


def _add_logs(commands: Commands) -> None:
    logs = commands.add_parser("logs", help="print a run's log")
    logs.add_argument("wanted", metavar="RUN", help=_RUN)
    logs.add_argument("-n", "--lines", type=int, help="print only the last LINES lines")
    logs.add_argument("-f", "--follow", action="store_true", help="print new lines until the run has ended")
    _add_runs_dir(logs)
    logs.set_defaults(run=_logs)


def _logs(options: argparse.Namespace) -> int:
    from largebatch.runs.logs import show_log

    show_log(find_run(options.wanted, options.runs_dir), options.lines, follow=options.follow)
    return 0


def _add_cancel(commands: Commands) -> None:
    cancel = commands.add_parser("cancel", help="stop runs after they have saved, on SLURM or on this machine")
    cancel.add_argument("runs", nargs="+", metavar="RUN", help=f"{_RUN}; or a folder of runs")
    _add_runs_dir(cancel)
    cancel.set_defaults(run=_cancel)


def _cancel(options: argparse.Namespace) -> int:
    from largebatch.runs.cancel import cancel

    return cancel(_named(options))


def _add_report(commands: Commands) -> None:
    report = commands.add_parser("report", help="compare the runs of a folder: HTML page, Markdown, CSV or Parquet")
    report.add_argument("runs_dir", nargs="?", default="runs", type=Path, help="default: runs")
    report.add_argument("--out", help="file, or - to print; default: report.html, or print md and csv")
    report.add_argument(
        "--format", choices=("html", "md", "csv", "parquet"), help="default: by the ending of --out, else html"
    )
    report.add_argument("--target", type=float, help="accuracy in 0..1; the page shows the steps to reach it")
    report.add_argument(
        "--by", action="append", default=[], metavar="KEY", help="give each value of this key its own row"
    )
    report.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from largebatch.report.build import report

    print(report(options.runs_dir, options.out, options.format, options.target, options.by))
    return 0


def _add_runs(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", nargs="*", metavar="RUN", help=f"a folder of runs (default: --runs-dir), or {_RUN}")
    _add_runs_dir(command)


def _add_runs_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--runs-dir", default="runs", type=Path, help="folder of the runs that names refer to (default: runs)"
    )


def _named(options: argparse.Namespace) -> list[RunFolder]:
    """Return the runs that the arguments name, each once."""
    wanted = options.runs or [str(options.runs_dir)]
    return list({run.path: run for each in wanted for run in find_runs(each, options.runs_dir)}.values())


def _add_sync(commands: Commands) -> None:
    sync = commands.add_parser("sync", help="upload to W&B what it lacks of runs")
    _add_runs(sync)
    sync.add_argument("--dry-run", action="store_true", help="print what would be uploaded; needs no key or network")
    sync.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="limit for one run; default: 600")
    sync.set_defaults(run=_sync)


def _sync(options: argparse.Namespace) -> int:
    from largebatch.tracking.sync import sync

    say = functools.partial(print, flush=True)
    return 1 if sync(_named(options), options.dry_run, say, options.timeout) else 0


if __name__ == "__main__":
    sys.exit(main())
