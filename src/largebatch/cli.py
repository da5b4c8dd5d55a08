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

from largebatch.arguments import parser
from largebatch.errors import UserError, require
from largebatch.runs.cancel import cancel
from largebatch.runs.folder import RunFolder, write_atomic
from largebatch.runs.table import find_run, find_runs, plain_table
from largebatch.runs.watch import show_log, show_status, watch_status
from largebatch.terminal import escape_unprintable, exit_code_of, restart_in_utf8


def _run(arguments: list[str]) -> int:
    # The imports take a second. A person who waits sees that the program has started.
    if sys.stderr.isatty() and not {"-sc", "--shell-completion"} & set(arguments):
        print("composing the configurations ...", file=sys.stderr, flush=True)
    from largebatch.launch.main import main

    return main(arguments)


def _named(options: argparse.Namespace) -> list[RunFolder]:
    """Return the runs that the arguments name, each once."""
    wanted = options.runs or [str(options.runs_dir)]
    return list({run.path: run for each in wanted for run in find_runs(each, options.runs_dir)}.values())


def _logs(options: argparse.Namespace) -> None:
    show_log(find_run(options.wanted, options.runs_dir), options.lines, options.follow)


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


_COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "status": _status, "logs": _logs, "cancel": lambda options: cancel(_named(options)), "report": _report,
    "fit-lr": _fit_lr, "critical": _critical, "confirm": _confirm, "replay": _replay, "dashboard": _dashboard,
    "sync": _sync, "export": _export, "evaluate": _evaluate, "predict": _predict, "surface": _surface,
}  # fmt: skip


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
    reader = parser()
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(reader)
    options, others = reader.parse_known_args(given)
    options.overrides = [other for other in others if not other.startswith("-")]
    if len(options.overrides) < len(others) or (others and options.command not in ("confirm", "replay", "evaluate")):
        reader.error(f"unrecognized arguments: {' '.join(others)}")
    sys.path.append(os.getcwd())  # last, so that own classes are found and replace none
    return exit_code_of(lambda: int(_COMMANDS[options.command](options) or 0))


if __name__ == "__main__":
    sys.exit(main())
