"""The plan: all runs of a command line, checked before the first run starts, and an estimate of their time."""

from __future__ import annotations

import functools
import math
import os
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largebatch.config.checks import validate
from largebatch.config.epochs import Epochs
from largebatch.config.identity import run_name
from largebatch.config.idle import idle_options, planned_length
from largebatch.config.schema import Config
from largebatch.config.typed import from_composed
from largebatch.errors import UserError
from largebatch.launch.branching import resolve_start
from largebatch.launch.checks import check_run
from largebatch.launch.composition import Composed
from largebatch.launch.devices import resolve_devices
from largebatch.launch.presets import program
from largebatch.launch.weights import resolve_weights
from largebatch.runs.folder import DONE, RunFolder
from largebatch.runs.table import list_runs

Summary = dict[str, Any]
_LONGEST_AXES = 80  # characters of the keys in a grid's W&B group; W&B allows 128
_NEEDED = ("wall_seconds", "steps", "processes", "global_batch", "train_images")
_DECODING = ("images_per_second", "decoded_images_per_second", "decoding_processes")


@dataclass(frozen=True)
class PlannedRun:
    config: Config
    folder: RunFolder
    label: str  # the overrides that differ within the grid; empty for a single run
    sweep: str = ""  # name of the run's sweep


def make_plan(jobs: Sequence[Composed]) -> list[PlannedRun]:
    """Return the runs of ``jobs``, in order and without duplicates.

    Raises:
        UserError: with every problem of every job, or if ``runs_dir`` can't be written.
    """
    for job in jobs:
        if job.sweep is not None and not job.multirun:
            command = " ".join((program(), "-m", *job.overrides))
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
            resolve_weights(config)
            resolve_start(config)
            resolve_devices(config)
            check_run(config)
            config.tracker.group = config.tracker.group or os.environ.get("WANDB_RUN_GROUP") or job.sweep
        except UserError as error:
            for line in str(error).splitlines():
                problems.setdefault(line, []).append(label)
            continue
        name = run_name(config)
        plan.setdefault(name, PlannedRun(config, RunFolder(Path(config.runs_dir) / name), label, job.sweep or ""))
    if problems:
        raise UserError("\n".join(_with_jobs(problem, labels, len(jobs)) for problem, labels in problems.items()))
    for runs_dir in {run.config.runs_dir for run in plan.values()}:
        _check_writable(Path(runs_dir))
    if len(plan) > 1:
        axes = dict.fromkeys(_key(override) for job in jobs for override in job.overrides if override not in common)
        # The same runs have the same group, however the command line writes them.
        group = f"{'-'.join(axes)[:_LONGEST_AXES]}-{zlib.crc32(' '.join(sorted(plan)).encode()):08x}"
        for run in plan.values():
            run.config.tracker.group = run.config.tracker.group or group
    return list(plan.values())


def _key(override: str) -> str:
    """Return ``"lr"`` for ``"optimizer.lr=2.0"``."""
    return override.lstrip("+~").partition("=")[0].rpartition(".")[2]


def notes(plan: Sequence[PlannedRun]) -> list[str]:
    """Return a line for each option that does nothing, with the label of a run that has it."""
    found: dict[str, list[str]] = {}
    for run in plan:
        length = planned_length(run.config)
        for note in idle_options(run.config, *length) if length else ():
            found.setdefault(note, []).append(run.label)
    return [_with_jobs(note, labels, len(plan)) for note, labels in found.items()]


def _with_jobs(problem: str, labels: list[str], jobs: int) -> str:
    if jobs == 1 or len(labels) == jobs:
        return problem
    return f"{problem}   [{labels[0]}{f' and {len(labels) - 1} more' if len(labels) > 1 else ''}]"


def _check_writable(runs_dir: Path) -> None:
    """Raise a ``UserError`` if ``runs_dir`` can't be written. Don't create it."""
    nearest = runs_dir
    try:
        nearest = next(folder for folder in (runs_dir, *runs_dir.parents) if folder.is_symlink() or folder.exists())
        # Only a trial is reliable: root ignores permissions, and a read-only file system has them too.
        # On Linux the file has no name, so a kill leaves nothing.
        tempfile.TemporaryFile(dir=nearest, prefix=".largebatch-").close()
    except OSError as error:
        raise UserError(
            f"runs_dir={runs_dir}: can't be written ({error.strerror}: {nearest}). Fix: runs_dir=FOLDER"
        ) from None


def estimated(runs: Sequence[PlannedRun]) -> str:
    """Describe the device-hours that ``runs`` still need; a device is a GPU, or on CPU a process.

    Each estimate scales the nearest finished run of the same data set, model, mode and kind of device: preferably of
    the same optimizer, then of the nearest batch size and length. It counts that run's wall time per training image,
    which includes start-up and evaluation.
    """
    hours = [found for run in runs if (found := _device_hours(run)) is not None]
    if not hours:
        return "no finished run of these data sets, models and modes to estimate the time from"
    which = "" if len(hours) == len(runs) else f" for {len(hours)} of them; no finished run to estimate the rest from"
    total = f"{sum(hours):,.1f} device-hours" if sum(hours) >= 0.95 else f"{60 * sum(hours):.2g} device-minutes"
    return f"about {total} to go, estimated from the nearest finished runs{which}"


def decoding(runs: Sequence[PlannedRun]) -> list[str]:
    """Return a line for each kind of run that decodes images while training, as measured by the nearest finished run.

    The line has the images per second that training takes without waiting for images, and those that are decoded.
    """
    lines = []
    for kind, run in {_kind(run): run for run in runs}.items():
        finished = _finished(Path(run.config.runs_dir), kind, run.config.cluster.device == "cuda")
        measured = [one for one in finished if all(_is_number(one[1].get(key)) for key in _DECODING)]
        if measured:
            nearest = min((one[1] for one in measured), key=lambda summary: _distance(summary, run.config))
            processes, waited = nearest["decoding_processes"], min(nearest.get("data_share") or 0.0, 0.99)
            lines.append(
                f"training needs {nearest['images_per_second'] / (1 - waited):,.0f} images/s, and {processes} decoding "
                f"process(es) decode {processes * nearest['decoded_images_per_second']:,.0f}, measured in "
                f"{nearest['name']}"
            )
    return lines


def expected_seconds(runs: Sequence[PlannedRun]) -> float | None:
    """Estimate the wall time of ``runs`` one after the other, from the runs that have finished by now.

    A run without a finished run of its kind counts as the mean of the others. None if all are without.
    """
    _finished.cache_clear()
    found: dict[tuple[object, ...], float | None] = {}
    expected = []
    for run in runs:
        config = run.config
        of_kind = (
            *run.folder.name.split("-")[:3], config.optimizer.name, config.batch_size, config.epochs, config.steps,
        )  # fmt: skip
        if of_kind not in found:
            found[of_kind] = _device_hours(run)
        if (hours := found[of_kind]) is not None:
            expected.append(3600 * hours / (config.cluster.processes or 1))
    return sum(expected) * len(runs) / len(expected) if expected else None


def _device_hours(run: PlannedRun) -> float | None:
    config = run.config
    finished = _finished(Path(config.runs_dir), _kind(run), config.cluster.device == "cuda")
    if not finished:
        return None
    nearest = min(finished, key=lambda one: (one[0] != config.optimizer.name, _distance(one[1], config)))[1]
    seconds = nearest["wall_seconds"] * _images(config, nearest) / _images_done(nearest)
    status = run.folder.read_status()
    done = 0.0 if status.get("state") in DONE else (status.get("step") or 0)  # a run with an outcome is repeated
    return float(seconds * nearest["processes"] * (1 - done / status["steps"] if done else 1) / 3600)


def _kind(run: PlannedRun) -> str:
    """Return data set, model and mode, as in the names of runs."""
    return "-".join(run.folder.name.split("-")[:3])


@functools.cache
def _finished(runs_dir: Path, kind: str, on_gpu: bool) -> list[tuple[str, Summary]]:
    """Return optimizer and summary of the finished runs of one kind."""
    found = []
    for folder in list_runs(runs_dir):
        if folder.name.startswith(kind + "-"):
            try:
                summary = folder.read_summary()
            except UserError:  # `largebatch status` names such folders
                continue
            complete = summary.get("state") == "finished" and all(_is_number(summary.get(key)) for key in _NEEDED)
            complete = complete and _is_number(summary.get("training_examples"), least=0)
            if complete and on_gpu != str(summary.get("device")).startswith("cpu"):
                found.append((folder.name.removeprefix(kind + "-").partition("-")[0], summary | {"name": folder.name}))
    return found


def _is_number(value: Any, least: float = 1e-9) -> bool:
    return isinstance(value, int | float) and least <= value < math.inf


def _distance(summary: Summary, config: Config) -> float:
    """Return the distance in the logarithms of batch size and training images."""
    batch, length = summary["global_batch"] / config.batch_size, _images_done(summary) / _images(config, summary)
    return abs(math.log(batch)) + abs(math.log(length))


def _images_done(summary: Summary) -> int:
    """Return the number of training images, without those of a probe or after an early stop."""
    images = summary["training_examples"] or summary["steps"] * summary["global_batch"]
    early = summary.get("stopped_early") is True and _is_number(summary.get("step"))
    done = summary["step"] / summary["steps"] if early else 1
    return max(int(images * done), 1)


def _images(config: Config, summary: Summary) -> int:
    """Return the number of images that a run will train on, with the data set's size from a finished run."""
    images = config.dataset.train_images or max(summary["train_images"], config.batch_size)
    last_batch = "drop" if config.dataset.last_batch == "drop" else "carry"  # keep has as many images as carry
    epochs = Epochs(images, config.batch_size, last_batch)
    return max(config.batch_size, epochs.examples(config.steps or epochs.steps_of(config.epochs or 0)))
