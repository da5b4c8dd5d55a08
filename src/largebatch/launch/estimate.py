"""Estimate of a plan's time, from finished runs in the same folder."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from largebatch.config.epochs import Epochs
from largebatch.config.schema import Config
from largebatch.errors import UserError
from largebatch.launch.plan import PlannedRun
from largebatch.runs.folder import DONE
from largebatch.runs.table import list_runs

Summary = dict[str, Any]


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


def _device_hours(run: PlannedRun) -> float | None:
    config = run.config
    kind = "-".join(run.folder.name.split("-")[:3])  # data set, model and mode
    finished = _finished(Path(config.runs_dir), kind, config.cluster.device == "cuda")
    if not finished:
        return None
    nearest = min(finished, key=lambda one: (one[0] != config.optimizer.name, _distance(one[1], config)))[1]
    seconds = nearest["wall_seconds"] * _images(config, nearest) / _images_done(nearest)
    status = run.folder.read_status()
    done = 0.0 if status.get("state") in DONE else (status.get("step") or 0)  # a run with an outcome is repeated
    return float(seconds * nearest["processes"] * (1 - done / status["steps"] if done else 1) / 3600)


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
            complete = summary.get("state") == "finished" and summary.get("wall_seconds") and summary.get("steps")
            if complete and on_gpu != str(summary["device"]).startswith("cpu"):
                found.append((folder.name.removeprefix(kind + "-").partition("-")[0], summary))
    return found


def _distance(summary: Summary, config: Config) -> float:
    """Return the distance in the logarithms of batch size and training images."""
    batch, length = summary["global_batch"] / config.batch_size, _images_done(summary) / _images(config, summary)
    return abs(math.log(batch)) + abs(math.log(length))


def _images_done(summary: Summary) -> int:
    """Return the number of training images, without those of a probe."""
    return int(summary["training_examples"] or summary["steps"] * summary["global_batch"])


def _images(config: Config, summary: Summary) -> int:
    """Return the number of images that a run will train on, with the data set's size from a finished run."""
    images = config.dataset.train_images or max(summary["train_images"], config.batch_size)
    last_batch = "drop" if config.dataset.last_batch == "drop" else "carry"  # keep has as many images as carry
    epochs = Epochs(images, config.batch_size, last_batch)
    return max(config.batch_size, epochs.examples(config.steps or epochs.steps_of(config.epochs or 0)))
