"""The ``largebatch`` command starts, shows, cancels, compares, confirms and uses runs."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

from largebatch import __version__
from largebatch.errors import UserError, require
from largebatch.runs.cancel import cancel
from largebatch.runs.folder import RunFolder, write_atomic
from largebatch.runs.table import find_run, find_runs, plain_table
from largebatch.runs.watch import show_log, show_status, watch_status
from largebatch.terminal import escape_unprintable, exit_code_of, printable, restart_in_utf8

_RUN = "a run's folder, or the beginning of its name or last eight digits"


_GROUPS = {
    "Train": ("run", "confirm", "replay"),
    "Watch": ("status", "logs", "cancel"),
    "Compare": ("report", "fit-lr", "critical"),
    "Use": ("export", "evaluate", "predict", "surface"),
    "Weights & Biases": ("sync", "dashboard"),
}


def main(arguments: list[str] | None = None) -> int:
    if importlib.util.find_spec("fcntl") is None:
        print("error: largebatch: runs need Linux or macOS. Allowed here: `import largebatch.optim`", file=sys.stderr)
        return 2
    if arguments is None:
        restart_in_utf8()
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["run"]:  # Hydra reads the rest
        return exit_code_of(lambda: _run(given[1:]))
    escape_unprintable()
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
    options, others = parser.parse_known_args(given)
    options.overrides = [other for other in others if not other.startswith("-")]
    if len(options.overrides) < len(others) or (others and options.command not in ("confirm", "replay", "evaluate")):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    sys.path.append(os.getcwd())  # last, so that own classes are found and replace none
    return exit_code_of(lambda: int(options.run(options) or 0))


def _run(arguments: list[str]) -> int:
    # The imports take a second. A person who waits sees that the program has started.
    if sys.stderr.isatty() and not {"-sc", "--shell-completion"} & set(arguments):
        print("composing the configurations ...", file=sys.stderr, flush=True)
    from largebatch.launch.main import main

    return main(arguments)


def _completions(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Return the overrides that argcomplete offers after ``largebatch run``."""
    from largebatch.launch.main import completions

    return completions(parsed_args.overrides, prefix)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors hold no control character of an argument."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _parser() -> argparse.ArgumentParser:
    description = "Train and compare large-batch optimizers."
    parser = _Parser(
        prog="largebatch",
        usage="largebatch [--help] [--version] COMMAND ...",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, prog="largebatch", help=argparse.SUPPRESS)
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
    status.set_defaults(run=_status)

    logs = add("logs", parents=[where], help="print a run's log")
    logs.add_argument("wanted", metavar="RUN", help=_RUN)
    logs.add_argument("-n", "--lines", type=int, help="print only the last LINES lines")
    logs.add_argument("-f", "--follow", action="store_true", help="print new lines until the run has ended")
    logs.set_defaults(run=lambda given: show_log(find_run(given.wanted, given.runs_dir), given.lines, given.follow))

    stop = add("cancel", parents=[where], help="stop runs after they have saved, on SLURM or on this machine")
    stop.add_argument("runs", nargs="+", metavar="RUN", help=f"{_RUN}; or a folder of runs")
    stop.set_defaults(run=lambda given: cancel(_named(given)))

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
    report.set_defaults(run=_report)

    fit = add("fit-lr", help="fit laws of the best learning rate over batch sizes, and predict it for the next")
    fit.add_argument("runs_dir", type=Path, metavar="RUNS_DIR", help="folder of a grid of learning rates x batch sizes")
    fit.add_argument("--batch", type=int, metavar="B", help="batch size to predict; default: twice the largest")
    fit.add_argument("--by", action="append", default=[], metavar="KEY", help="as for report")
    fit.add_argument("--epochs", type=float, metavar="E", help="validate after E epochs; default: the whole training")
    fit.add_argument("--json", action="store_true", help="print JSON instead of tables")
    fit.set_defaults(run=_fit_lr)

    critical = add("critical", help="show the batch size beyond which more devices save little time")
    critical.add_argument("runs_dir", type=Path, metavar="RUNS_DIR", help="folder of runs at several batch sizes")
    critical.add_argument("--target", type=float, help="as for report; default: reached by half of the cells")
    critical.add_argument("--target-metric", metavar="METRIC", help="as for report")
    critical.add_argument("--by", action="append", default=[], metavar="KEY", help="as for report")
    critical.add_argument("--json", action="store_true", help="print JSON instead of tables")
    critical.set_defaults(run=_critical)

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
    confirm.set_defaults(run=_confirm)

    replay = add(
        "replay",
        parents=[where],
        usage="largebatch replay RUN [OVERRIDE ...]",
        help="run a configuration again, and show at which step the two runs part",
        epilog="OVERRIDE: as for `largebatch run`, such as cluster=slurm; it can't change a setting.",
    )
    replay.add_argument("wanted", metavar="RUN", help=f"{_RUN}; the new run goes to RUNS_DIR-replayed")
    replay.set_defaults(run=_replay)

    dashboard = add("dashboard", help="write or update a W&B project's saved view and its report")
    given = os.environ.get
    dashboard.add_argument("--entity", default=given("WANDB_ENTITY"), help="W&B user or team; default: WANDB_ENTITY")
    dashboard.add_argument(
        "--project", default=given("WANDB_PROJECT") or "largebatch", help="default: WANDB_PROJECT, else largebatch"
    )
    dashboard.add_argument("--name", default="large batch", help="name of view and report; the same name replaces both")
    dashboard.add_argument("--runs", metavar="RUNS_DIR", type=Path, help="add a table of these runs to the report")
    dashboard.add_argument("--print", action="store_true", help="print view and report as JSON; needs no network")
    dashboard.set_defaults(run=_dashboard)

    sync = add("sync", parents=[named], help="upload to W&B the rows of runs that it lacks")
    sync.add_argument("--dry-run", action="store_true", help="print what would be uploaded; needs no key or network")
    sync.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="time for one run; default: 600")
    sync.set_defaults(run=_sync)
    _add_results(add, where)
    parser.epilog = _grouped(helps)
    return parser


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
    export.set_defaults(run=_export)

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
    evaluate.set_defaults(run=_evaluate)

    predict = add("predict", parents=[weights], help="print class and probability of images, as CSV")
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="an image file, or a folder of image files")
    predict.add_argument("--out", type=Path, metavar="FILE", help="write the CSV there instead of printing it")
    predict.set_defaults(run=_predict)

    surface = add("surface", parents=[weights], help="draw the training loss around a run's weights")
    surface.add_argument("--plane", action="store_true", help="along two random directions; default: along one")
    surface.add_argument("--radius", type=float, default=1.0, help="distance, in norms of each filter; default: 1")
    for name, default in ("samples", 512), ("points", 21), ("seed", 0):
        surface.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default: {default}")
    surface.add_argument("--out", type=Path, metavar="FILE", help="HTML; default: NAME-surface.html, with a .json")
    surface.set_defaults(run=_surface)


def _grouped(helps: dict[str, str]) -> str:
    """Return the commands and their help texts, in groups."""
    groups = {**_GROUPS, "Other": tuple(helps.keys() - {name for names in _GROUPS.values() for name in names})}
    lines = ["`largebatch COMMAND --help` shows the options of a command."]
    for title, names in groups.items():
        if names:
            lines += ["", f"{title}:", *(f"  {name:<11} {helps[name]}" for name in names)]
    return "\n".join(lines)


def _named(options: argparse.Namespace) -> list[RunFolder]:
    """Return the runs that the arguments name, each once."""
    wanted = options.runs or [str(options.runs_dir)]
    return list({run.path: run for each in wanted for run in find_runs(each, options.runs_dir)}.values())


def _status(options: argparse.Namespace) -> None:
    if options.watch:
        watch_status(lambda: _named(options))
    else:
        show_status(_named(options), as_json=options.json)


def _report(options: argparse.Namespace) -> None:
    if sys.stderr.isatty():  # the imports and the runs take seconds
        print(f"reading the runs in {options.runs_dir} ...", file=sys.stderr)
    from largebatch.report.build import report
    from largebatch.report.targets import Target

    target = Target(options.target, options.target_metric)
    print(report(options.runs_dir, options.out, options.format, target, options.by))


def _fit_lr(options: argparse.Namespace) -> None:
    from largebatch.report.fit_lr import fit_lr

    print(fit_lr(options.runs_dir, options.by, options.batch, options.epochs, as_json=options.json))


def _critical(options: argparse.Namespace) -> None:
    from largebatch.report.critical import critical
    from largebatch.report.targets import Target

    target = Target(options.target, options.target_metric)
    print(critical(options.runs_dir, target, options.by, as_json=options.json))


def _confirm(options: argparse.Namespace) -> int:
    from largebatch.launch.confirm import confirmation_jobs
    from largebatch.launch.grid import carry_out_plan, show_plan
    from largebatch.launch.plan import make_plan
    from largebatch.report.confirm import confirmation

    found = confirmation(options.runs_dir, options.seeds, options.by)
    overrides = [*options.overrides, *(["dry_run=true"] if options.dry_run else [])]
    plan = make_plan(confirmation_jobs(found.configs, found.seeds, options.runs_dir, overrides))
    print("\n".join([*found.notes, f"seeds: {', '.join(map(str, found.seeds))}"]), flush=True)
    if plan[0].config.dry_run:
        return show_plan(plan)
    return carry_out_plan(plan, "".join(f" --by {key}" for key in options.by))


def _replay(options: argparse.Namespace) -> int:
    from largebatch.launch.grid import carry_out_plan
    from largebatch.launch.plan import make_plan
    from largebatch.launch.replay import difference, replay_job

    first = find_run(options.wanted, options.runs_dir)
    if first.state() != "finished":
        raise UserError(f"{first.path}: the run hasn't finished; it is {first.state()}. Fix: finish it first")
    runs_dir = first.path.absolute().parent
    plan = make_plan([replay_job(first, runs_dir.with_name(f"{runs_dir.name}-replayed"), options.overrides)])
    code = carry_out_plan(plan)
    second = plan[0].folder
    if code or second.state() != "finished":
        return code
    found = difference(first, second)
    print(found or "metrics, layers and final parameters are equal, bit for bit")
    return 1 if found else 0


def _dashboard(options: argparse.Namespace) -> None:
    require("wandb")
    from largebatch.report import dashboard, saved_view

    if not (options.entity or options.print):
        raise UserError("--entity: no W&B user or team to save to. Fix: --entity TEAM, or set WANDB_ENTITY")
    where = options.entity or "ENTITY", options.project, options.name
    views = [
        saved_view.of_workspace(dashboard.workspace(*where)),
        saved_view.of_report(dashboard.report(*where, options.runs)),
    ]
    if options.print:
        print(json.dumps([dataclasses.asdict(view) for view in views], indent=1))
        return
    for view, url in zip(views, saved_view.save(views), strict=True):
        print(f"{'workspace' if view.kind == 'project-view' else 'report'}: {url}")


def _sync(options: argparse.Namespace) -> int:
    from largebatch.tracking.sync import sync

    return 1 if sync(_named(options), options.dry_run, options.timeout) else 0


def _export(options: argparse.Namespace) -> None:
    from largebatch.results.export import ENDINGS, export
    from largebatch.results.run import load_run

    run = load_run(options.wanted, options.checkpoint, options.runs_dir)
    out = options.out or Path(run.folder.path.absolute().name + ENDINGS[options.to])
    export(run, options.to, out, backbone=options.backbone)
    print(out)


def _evaluate(options: argparse.Namespace) -> None:
    from largebatch.results.evaluate import chosen_device, evaluate, table_of_metrics
    from largebatch.results.run import load_run

    run = load_run(options.wanted, options.checkpoint, options.runs_dir)
    overrides = [*([f"dataset={options.dataset}"] if options.dataset else []), *options.overrides]
    device = chosen_device(options.device)
    found = evaluate(run, overrides, device, lambda line: print(line, file=sys.stderr, flush=True))
    if options.json != "-":
        print(plain_table(["set", "images", "loss", "accuracy", "top 5"], table_of_metrics(found)))
    if options.json:
        text = json.dumps(found, indent=1)
        print(text) if options.json == "-" else write_atomic(Path(options.json), text + "\n")


def _predict(options: argparse.Namespace) -> int:
    from largebatch.results.predict import predict
    from largebatch.results.run import load_run

    run = load_run(options.wanted, options.checkpoint, options.runs_dir)
    with options.out.open("w", encoding="utf-8") if options.out else nullcontext(sys.stdout) as out:
        return 1 if predict(run, options.images, out) else 0


def _surface(options: argparse.Namespace) -> None:
    require("report")
    from largebatch.results.run import load_run
    from largebatch.results.surface import check_out, surface, write_surface

    check_out(options.out or Path())
    run = load_run(options.wanted, options.checkpoint, options.runs_dir)
    given = {name: getattr(options, name) for name in ("samples", "points", "radius", "plane", "seed")}
    found = surface(run, **given, say=lambda line: print(line, file=sys.stderr, flush=True))
    print(*write_surface(found, options.out), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
