"""How long the runs of a plan will take, going by those that have finished in the same folder."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from largebatch.config.schema import Config
from largebatch.errors import UserError
from largebatch.launch.plan import PlannedRun
from largebatch.runs.table import list_runs

Summary = dict[str, Any]


def estimated(runs: Sequence[PlannedRun]) -> str:
    """The device-hours that ``runs`` have before them, in words; a device is a GPU, or on CPU a process.

    Each goes by the finished run of the same data set, model, mode and kind of device that is nearest to it: of its
    optimizer if there is one, and of the nearest batch size and length. What counts is that run's wall time an image
    of the main training, start-up and evaluation included.
    """
    if not runs:
        return ""
    hours = [found for run in runs if (found := _device_hours(run)) is not None]
    if not hours:
        return "no finished run of these data sets, models and modes tells how long they take"
    which = "" if len(hours) == len(runs) else f" for {len(hours)} of them; nothing finished tells of the others"
    return f"about {_in_words(sum(hours))} to go, by the finished runs nearest to them{which}"


def _device_hours(run: PlannedRun) -> float | None:
    config = run.config
    finished = _finished(Path(config.runs_dir), _kind(run.folder.name), config.cluster.device == "cuda")
    if not finished:
        return None
    nearest = min(finished, key=lambda one: (one[0] != config.optimizer.name, _distance(one[1], config)))[1]
    seconds = nearest["wall_seconds"] * _images(config, nearest) / _images_done(nearest)
    status = run.folder.read_status()
    done = 0.0 if status.get("state") in ("finished", "diverged") else (status.get("step") or 0)  # else it is repeated
    return float(seconds * nearest["processes"] * (1 - done / status["steps"] if done else 1) / 3600)


@functools.cache
def _finished(runs_dir: Path, kind: str, on_gpu: bool) -> list[tuple[str, Summary]]:
    """Optimizer and summary of the finished runs of one kind."""
    found = []
    for folder in list_runs(runs_dir):
        if folder.name.startswith(kind + "-"):
            try:
                summary = folder.read_summary()
            except UserError:  # `status` names such folders
                continue
            complete = summary.get("state") == "finished" and summary.get("wall_seconds") and summary.get("steps")
            if complete and on_gpu != str(summary["device"]).startswith("cpu"):
                found.append((folder.name.removeprefix(kind + "-").partition("-")[0], summary))
    return found


def _kind(name: str) -> str:
    """Data set, model and mode, from a run folder's name."""
    return "-".join(name.split("-")[:3])


def _distance(summary: Summary, config: Config) -> float:
    """In factors of batch size and of length."""
    batch, length = summary["global_batch"] / config.batch_size, _images_done(summary) / _images(config, summary)
    return abs(math.log(batch)) + abs(math.log(length))


def _images_done(summary: Summary) -> int:
    """Without those of a probe, which follow from them."""
    return int(summary.get("pretraining_steps") or summary["steps"]) * int(summary["global_batch"])


def _images(config: Config, summary: Summary) -> int:
    """That a run will take, its data set having as many as that of a finished one."""
    steps = config.steps or (config.epochs or 0) * (summary["train_images"] // config.batch_size)
    return max(1, steps) * config.batch_size


def _in_words(hours: float) -> str:
    return f"{hours:,.1f} device-hours" if hours >= 0.95 else f"{hours:.2g} device-hours ({60 * hours:.2g} minutes)"
