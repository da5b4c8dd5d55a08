"""Facts of a run: resolved learning rate, batch, length, device, versions. For the log, the summary and W&B."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from largebatch.config.schema import Config
from largebatch.runs.provenance import git_state
from largebatch.training.optimization import resolved_lr
from largebatch.training.state import Run, Training

Facts = dict[str, Any]
_PRACTICE = ("clip_norm", "ema_decay")  # keys that the log shows if they are set
_PACKAGES = (
    *("largebatch", "torch", "torchvision", "timm", "pytorch_optimizer", "numpy", "pillow", "wandb"),
    *("nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13"),
)
_PLACES = {"device": "on the device", "host": "in host memory", "files": "decoded while training"}


def gather_facts(run: Run, training: Training, total_steps: int) -> Facts:
    """Return the resolved values of a run's configuration, without those specific to its mode."""
    config, data, batch, device = run.config, run.data, run.batch, run.device
    return {
        "lr": resolved_lr(config),
        "optimizer_options": config.optimizer.arguments(config.batch_size, run.epochs.steps, run.steps),
        "steps": total_steps,
        "steps_per_epoch": run.epochs.steps,
        "training_examples": run.epochs.examples(run.steps),
        "global_batch": batch.global_batch,
        "processes": batch.processes,
        "per_process_batch": batch.per_process,
        "accumulation": batch.accumulation,
        "micro_batch": batch.micro_batch,
        "precision": run.arithmetic.precision,
        "channels_last": run.arithmetic.channels_last,
        "tf32": config.tf32,
        "compiled": training.network is not training.replica,
        "cuda_graphs": not training.graphs.off,
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "train_images": len(data.train),
        "val_images": len(data.val) if data.val is not None else 0,
        "test_images": len(data.test),
        "skipped_images": data.skipped,
        "data_location": data.place,
        "decoding_processes": max(config.dataset.workers, 1) * batch.processes if data.place == "files" else 0,
        "data": data.content.digest,
        "classes": data.num_classes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        **git_state(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def facts_in_words(config: Config, facts: Facts) -> list[str]:
    """Return lines for the log: data and model, batch and length, optimizer and device."""
    held_out = f", {facts['val_images']:,} for validation" if facts["val_images"] else ""
    skipped = f", {facts['skipped_images']:,} unreadable and skipped" if facts["skipped_images"] else ""
    noise = config.lr_scaling.noise_scale
    rule = config.lr_scaling.rule + (f", lr_scaling.noise_scale={noise:g}" if noise is not None else "")
    scaled = f" (optimizer.lr={config.optimizer.lr:g}, lr_scaling.rule={rule})"
    lr_1d = config.optimizer.learning_rate_1d()
    if lr_1d is not None:
        scaled += f", {config.lr_scaling.scaled(lr_1d, config.batch_size):g} for biases and norm parameters"
    most = "at most " if config.batch_schedule.measures else ""
    practice = [f"{key}={given:g}" for key in _PRACTICE if (given := getattr(config, key)) is not None]
    norm = f", batch norm over {config.batch_norm_size:,}" if config.batch_norm_size else ""
    return [
        f"{config.dataset.name}: {facts['train_images']:,} training images{held_out}, {facts['test_images']:,} test"
        f"{skipped}, {_PLACES[facts['data_location']]}; {config.model.name}: {facts['parameters']:,} parameters",
        f"batch {facts['global_batch']:,} = {facts['processes']} process(es) x {facts['accumulation']} micro-batch(es) "
        f"of {facts['micro_batch']:,}{norm}; "
        f"{facts['steps_per_epoch']:,g} steps per epoch, {most}{facts['steps']:,} in total",
        f"{config.optimizer.name}: lr {facts['lr']:g}{scaled}; schedule {config.schedule.name}; "
        f"{facts['precision']}{', channels last,' if facts['channels_last'] else ''} on {facts['device']}"
        + "".join(f"; {one}" for one in practice),
    ]


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # an optional package that isn't installed
    return found
