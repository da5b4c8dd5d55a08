"""The arguments of the ``largebatch`` command."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from largebatch import __version__
from largebatch.terminal import printable

_RUN = "a run's folder, or the beginning of its name or last eight digits"


_GROUPS = {
    "Train": ("run", "confirm", "replay"),
    "Watch": ("status", "logs", "cancel"),
    "Compare": ("report", "fit-lr", "critical"),
    "Use": ("export", "evaluate", "predict", "surface"),
    "Weights & Biases": ("sync", "dashboard"),
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors hold no control character of an argument."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``largebatch``; ``command`` names the command."""
    description = "Train and compare large-batch optimizers."
    whole = _Parser(
        prog="largebatch",
        usage="largebatch [--help] [--version] COMMAND ...",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = whole.add_subparsers(dest="command", required=True, prog="largebatch", help=argparse.SUPPRESS)
    helps: dict[str, str] = {}

    def add(name: str, **options: Any) -> argparse.ArgumentParser:
        helps[name] = options["help"]
        return commands.add_parser(name, **options)

    run = add("run", help="train: one run, or a grid with -m; `largebatch run --help` lists presets")
    run.add_argument("-m", "--multirun", action="store_true")
    overrides = run.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="group=preset or key=value")
    overrides.completer = _completions  # type: ignore[attr-defined]

    where = argparse.ArgumentParser(add_help=False)
    where.add_argument(
        "--runs-dir", default="runs", type=Path, help="folder of the runs that names refer to (default: runs)"
    )
    named = argparse.ArgumentParser(add_help=False, parents=[where])
    named.add_argument("runs", nargs="*", metavar="RUN", help=f"a folder of runs (default: --runs-dir), or {_RUN}")

    status = add("status", parents=[named], help="show states, steps, test accuracies, jobs and last log lines")
    status.add_argument("--json", action="store_true", help="print a JSON list instead of the table")
    status.add_argument("--watch", action="store_true", help="update until no run is queued or running")

    logs = add("logs", parents=[where], help="print a run's log")
    logs.add_argument("wanted", metavar="RUN", help=_RUN)
    logs.add_argument("-n", "--lines", type=int, help="print only the last LINES lines")
    logs.add_argument("-f", "--follow", action="store_true", help="print new lines until the run has ended")

    stop = add("cancel", parents=[where], help="stop runs after they have saved, on SLURM or on this machine")
    stop.add_argument("runs", nargs="+", metavar="RUN", help=f"{_RUN}; or a folder of runs")

    report = add("report", help="compare the runs of a folder: HTML page, Markdown, CSV or Parquet")
    report.add_argument("runs_dir", nargs="?", default="runs", type=Path, help="default: runs")
    report.add_argument("--out", help="file, or - to print; default: report.html, or print md and csv")
    report.add_argument(
        "--format", choices=("html", "md", "csv", "parquet"), help="default: by the ending of --out, else html"
    )
    report.add_argument("--target", type=float, help="accuracy in 0..1, or a loss; shows the training to reach it")
    report.add_argument(
        "--target-metric", metavar="METRIC", help="metric of --target, such as train/loss; default: the main accuracy"
    )
    report.add_argument(
        "--by", action="append", default=[], metavar="KEY", help="give each value of this key its own row"
    )

    fit = add("fit-lr", help="fit laws of the best learning rate over batch sizes, and predict it for the next")
    fit.add_argument("runs_dir", type=Path, metavar="RUNS_DIR", help="folder of a grid of learning rates x batch sizes")
    fit.add_argument("--batch", type=int, metavar="B", help="batch size to predict; default: twice the largest")
    fit.add_argument("--by", action="append", default=[], metavar="KEY", help="as for report")
    fit.add_argument("--epochs", type=float, metavar="E", help="validate after E epochs; default: the whole training")
    fit.add_argument("--json", action="store_true", help="print JSON instead of tables")

    critical = add("critical", help="show the batch size beyond which more devices save little time")
    critical.add_argument("runs_dir", type=Path, metavar="RUNS_DIR", help="folder of runs at several batch sizes")
    critical.add_argument("--target", type=float, help="as for report; default: reached by half of the cells")
    critical.add_argument("--target-metric", metavar="METRIC", help="as for report")
    critical.add_argument("--by", action="append", default=[], metavar="KEY", help="as for report")
    critical.add_argument("--json", action="store_true", help="print JSON instead of tables")

    confirm = add(
        "confirm",
        usage="largebatch confirm RUNS_DIR [--seeds N] [--by KEY] [--dry-run] [OVERRIDE ...]",
        help="run the chosen settings again on fresh seeds, which the report then shows",
        epilog="OVERRIDE: as for `largebatch run`, such as cluster=slurm; it can't change a setting.",
    )
    confirm.add_argument("runs_dir", type=Path, metavar="RUNS_DIR", help="folder of runs; the new runs go there too")
    confirm.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds of each setting; default: 5")
    confirm.add_argument("--by", action="append", default=[], metavar="KEY", help="as for report")
    confirm.add_argument("--dry-run", action="store_true", help="show the runs, start nothing")

    replay = add(
        "replay",
        parents=[where],
        usage="largebatch replay RUN [OVERRIDE ...]",
        help="run a configuration again, and show at which step the two runs part",
        epilog="OVERRIDE: as for `largebatch run`, such as cluster=slurm; it can't change a setting.",
    )
    replay.add_argument("wanted", metavar="RUN", help=f"{_RUN}; the new run goes to RUNS_DIR-replayed")

    dashboard = add("dashboard", help="write or update a W&B project's saved view and its report")
    given = os.environ.get
    dashboard.add_argument("--entity", default=given("WANDB_ENTITY"), help="W&B user or team; default: WANDB_ENTITY")
    dashboard.add_argument(
        "--project", default=given("WANDB_PROJECT") or "largebatch", help="default: WANDB_PROJECT, else largebatch"
    )
    dashboard.add_argument("--name", default="large batch", help="name of view and report; the same name replaces both")
    dashboard.add_argument("--runs", metavar="RUNS_DIR", type=Path, help="add a table of these runs to the report")
    dashboard.add_argument("--print", action="store_true", help="print view and report as JSON; needs no network")

    sync = add("sync", parents=[named], help="upload to W&B the rows of runs that it lacks")
    sync.add_argument("--dry-run", action="store_true", help="print what would be uploaded; needs no key or network")
    sync.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="time for one run; default: 600")
    _add_results(add, where)
    whole.epilog = _grouped(helps)
    return whole


def _add_results(add: Callable[..., argparse.ArgumentParser], where: argparse.ArgumentParser) -> None:
    """Add the commands that use a run's weights."""
    weights = argparse.ArgumentParser(add_help=False, parents=[where])
    weights.add_argument("wanted", metavar="RUN", help=_RUN)
    which = weights.add_mutually_exclusive_group()
    which.add_argument(
        "--last", dest="checkpoint", action="store_const", const="last", default="last",
        help="take the last checkpoint (default)",
    )  # fmt: skip
    which.add_argument(
        "--best", dest="checkpoint", action="store_const", const="best",
        help="take the best checkpoint on validation images, of a run with tracker.checkpoints=true",
    )  # fmt: skip

    export = add("export", parents=[weights], help="write a run's weights for other programs")
    export.add_argument("--to", required=True, choices=("safetensors", "torch", "onnx"))
    export.add_argument("--out", type=Path, metavar="FILE", help="default: the run's name, in the current folder")
    export.add_argument("--backbone", action="store_true", help="leave out the classifier, as always in mode bt")

    evaluate = add(
        "evaluate",
        parents=[weights],
        usage="largebatch evaluate RUN [--best] [--dataset NAME] [--device DEVICE] [--json FILE] [OVERRIDE ...]",
        help="evaluate a run's weights again, or on another data set with the same classes",
        epilog="OVERRIDE: a key of the data set, as for launch.py, such as dataset.root=FOLDER.",
    )
    evaluate.add_argument("--dataset", metavar="NAME", help="preset of another data set; default: the run's own")
    evaluate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    evaluate.add_argument(
        "--json", metavar="FILE", help="write the metrics as JSON; - prints them instead of the table"
    )

    predict = add("predict", parents=[weights], help="print class and probability of images, as CSV")
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="an image file, or a folder of image files")
    predict.add_argument("--out", type=Path, metavar="FILE", help="write the CSV there instead of printing it")

    surface = add("surface", parents=[weights], help="draw the training loss around a run's weights")
    surface.add_argument("--plane", action="store_true", help="along two random directions; default: along one")
    surface.add_argument("--radius", type=float, default=1.0, help="distance, in norms of each filter; default: 1")
    for name, default in ("samples", 512), ("points", 21), ("seed", 0):
        surface.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default: {default}")
    surface.add_argument("--out", type=Path, metavar="FILE", help="HTML; default: NAME-surface.html, with a .json")


def _grouped(helps: dict[str, str]) -> str:
    """Return the commands and their help texts, in groups."""
    groups = {**_GROUPS, "Other": tuple(helps.keys() - {name for names in _GROUPS.values() for name in names})}
    lines = ["`largebatch COMMAND --help` shows the options of a command."]
    for title, names in groups.items():
        if names:
            lines += ["", f"{title}:", *(f"  {name:<11} {helps[name]}" for name in names)]
    return "\n".join(lines)


def _completions(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Return the overrides that argcomplete offers after ``largebatch run``."""
    from largebatch.launch.main import completions

    return completions(parsed_args.overrides, prefix)
