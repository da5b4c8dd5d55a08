"""The plan: all runs of a command line, checked before the first run starts."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from largebatch.config.checks import validate
from largebatch.config.epochs import plan_epochs
from largebatch.config.identity import run_name
from largebatch.config.schema import Config, from_composed
from largebatch.errors import UserError
from largebatch.launch.composition import Composed
from largebatch.launch.devices import resolve_devices
from largebatch.runs.folder import RunFolder


@dataclass(frozen=True)
class PlannedRun:
    config: Config
    folder: RunFolder
    label: str  # the overrides that differ within the grid; empty for a single run


def make_plan(jobs: Sequence[Composed]) -> list[PlannedRun]:
    """Return the runs of ``jobs``, in order and without duplicates.

    Raises:
        UserError: with every problem of every job, or if ``runs_dir`` can't be written.
    """
    for job in jobs:
        if job.sweep is not None and not job.multirun:
            command = " ".join(("python launch.py -m", *job.overrides))
            raise UserError(f"sweeps={job.sweep}: is a grid and needs -m. Fix: {command}")
        for key in ("cases", "trials"):
            if job.tree.get(key) and not job.multirun:
                raise UserError(f"{key}: only a grid has this key. Fix: add -m, or leave it out for one run")
    common = set(jobs[0].overrides).intersection(*(job.overrides for job in jobs))
    plan: dict[str, PlannedRun] = {}
    problems: dict[str, list[str]] = {}
    for job in jobs:
        label = " ".join(override for override in job.overrides if override not in common)
        try:
            config = from_composed(job.tree)
            validate(config)
            resolve_devices(config)
            if config.dataset.train_images is not None:
                plan_epochs(config, config.dataset.train_images)
            config.tracker.group = config.tracker.group or job.sweep
        except UserError as error:
            for line in str(error).splitlines():
                problems.setdefault(line, []).append(label)
            continue
        name = run_name(config)
        plan.setdefault(name, PlannedRun(config, RunFolder(Path(config.runs_dir) / name), label))
    if problems:
        raise UserError("\n".join(_with_jobs(problem, labels, len(jobs)) for problem, labels in problems.items()))
    for runs_dir in {run.config.runs_dir for run in plan.values()}:
        _check_writable(Path(runs_dir))
    return list(plan.values())


def _with_jobs(problem: str, labels: list[str], jobs: int) -> str:
    if jobs == 1 or len(labels) == jobs:
        return problem
    return f"{problem}   [{labels[0]}{f' and {len(labels) - 1} more' if len(labels) > 1 else ''}]"


def _check_writable(runs_dir: Path) -> None:
    """Raise a ``UserError`` if ``runs_dir`` can't be written. Don't create it."""
    nearest = next(folder for folder in (runs_dir, *runs_dir.parents) if folder.exists())
    try:
        # Only a trial is reliable: root ignores permissions, and a read-only file system has them too.
        tempfile.TemporaryDirectory(dir=nearest, prefix=".largebatch-").cleanup()
    except OSError as error:
        raise UserError(
            f"runs_dir={runs_dir}: can't be written ({error.strerror}: {nearest}). Fix: runs_dir=FOLDER"
        ) from None
