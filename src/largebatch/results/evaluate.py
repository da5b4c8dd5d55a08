"""``largebatch evaluate``: a checkpoint's metrics on the run's own test set, or on another data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from omegaconf import OmegaConf

from largebatch.config.batch import BatchPlan
from largebatch.config.epochs import Epochs
from largebatch.config.options import problems_of
from largebatch.config.schema import Config
from largebatch.config.typed import from_composed
from largebatch.data import Data, Split, load_data
from largebatch.errors import UserError
from largebatch.launch.confirm import compose_overrides
from largebatch.machine.precision import Arithmetic, allow_tf32, described
from largebatch.modes import bt
from largebatch.results.run import LoadedRun
from largebatch.training.evaluation import (
    classified,
    classified_features,
    held_out,
    metrics_of_images,
    split_features,
)
from largebatch.training.state import Run


def evaluate(
    run: LoadedRun, overrides: Sequence[str], device: torch.device, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return metrics of the checkpoint, such as ``test/accuracy``, and a description of what was evaluated.

    On the run's own data set, device and number of threads, they are the metrics that the run logged at this step.

    Args:
        overrides: choice and options of another data set, such as ``dataset=imagefolder``. Without any, the run's own.
        device: device of the evaluation. On a CPU, it computes in fp32.
        say: called with lines about slow work, and about deviations from the run's data.

    Raises:
        UserError: the data set can't be loaded, or has a class that the run doesn't know.
    """
    config = evaluated_config(run, overrides)
    data = load_data(config.dataset, config.seed, device, say)
    difference = data.content.difference(run.saved["data"])
    if not overrides and difference:
        say(f"the data set has changed since the run began: {difference}")
    data = _with_labels_of(run, data, config)
    numbers = _metrics(as_run(run, config, data, device), run)
    return {
        "run": run.folder.path.absolute().name,
        "step": run.step,
        "dataset": config.dataset.name,
        "data": data.content.digest,
        "device": device.type,
        "images": {name: len(split) for name, split in (("val", data.val), ("test", data.test)) if split is not None},
        **numbers,
    }


def evaluated_config(run: LoadedRun, overrides: Sequence[str]) -> Config:
    """Return the run's configuration with the data set of ``overrides``, and the run's preprocessing.

    Raises:
        UserError: an override isn't of the data set, or is invalid.
    """
    config = run.config
    if overrides:
        composed, given = compose_overrides(overrides)
        for key, text in given.items():
            if key.partition(".")[0] != "dataset":
                raise UserError(f"{text}: only the data set can change. Allowed: dataset=NAME, dataset.KEY=VALUE")
        tree = OmegaConf.create(asdict(config))
        if "dataset" in given:
            tree["dataset"] = composed["dataset"]
        for key in given.keys() - {"dataset"}:
            OmegaConf.update(tree, key, OmegaConf.select(composed, key), merge=False)
        config = from_composed(tree)
    channels, side, _ = run.shape
    dataset = replace(config.dataset, channels=channels, image_size=side, mean=list(run.mean), std=list(run.std))
    if problems := problems_of(dataset, "dataset."):
        raise UserError("\n".join(problems))
    return replace(config, dataset=dataset, micro_batch="auto")  # halves batches that don't fit into memory


def _with_labels_of(run: LoadedRun, data: Data, config: Config) -> Data:
    """Return the data with the run's labels for the classes, which are matched by name.

    Raises:
        UserError: the run doesn't know a class.
    """
    if unknown := [name for name in data.classes if name not in run.classes]:
        raise UserError(
            f"dataset={config.dataset.name}: has {len(unknown)} of {len(data.classes)} classes that the run doesn't "
            f"know, such as {unknown[0]}. Allowed: {', '.join(run.classes[:10])}{' ...' * (len(run.classes) > 10)}"
        )
    label_of = torch.tensor([run.classes.index(name) for name in data.classes], device=data.test.labels.device)
    relabelled = {
        name: None if split is None else Split(split.images, label_of[split.labels])
        for name, split in (("val", data.val), ("test", data.test))
    }
    return replace(data, classes=run.classes, **cast(Any, relabelled))


def as_run(run: LoadedRun, config: Config, data: Data, device: torch.device) -> Run:
    """Return the constant part of a run in one process, for the evaluations of training."""
    arithmetic = described(run.folder.read_status().get("arithmetic"))
    if arithmetic is None or device.type == "cpu":
        arithmetic = Arithmetic("fp32", channels_last=arithmetic is not None and arithmetic.channels_last)
    allow_tf32(config.tf32)
    batch = BatchPlan(config.batch_size, 1, run.saved["micro_batch"])
    epochs = Epochs(len(data.train), config.batch_size, config.dataset.last_batch)
    return Run(config, run.folder, 0, 1, device, data, batch, epochs, run.step, arithmetic)


def _metrics(state: Run, run: LoadedRun) -> dict[str, float]:
    """Return the metrics of the held-out sets, computed as in training."""
    last = state.arithmetic.memory_format
    if run.config.mode.name == "bt" and not bt.options(run.config).lr_backbone:
        head = run.probe_head().to(state.device)
        backbone = run.backbone().to(state.device).to(memory_format=last)
        model = bt.BarlowTwins(backbone, head.in_features, [1]).eval()
        features = {name: split_features(state, model, split) for name, split in held_out(state)}
        with torch.no_grad():
            return metrics_of_images(classified_features(state, head, features))
    return metrics_of_images(classified(state, run.model().to(state.device).to(memory_format=last)))


def chosen_device(name: str) -> torch.device:
    """Return the device for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UserError: there is no GPU for ``cuda``.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU found here. Allowed: auto, cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def table_of_metrics(found: dict[str, Any]) -> list[list[str]]:
    """Return a line for each split: its name, images, loss, accuracy and top-5 accuracy."""
    return [
        [name, f"{count:,}", f"{found[f'{name}/loss']:.6f}"]
        + [f"{100 * found[f'{name}/{metric}']:.2f} %" for metric in ("accuracy", "top5")]
        for name, count in found["images"].items()
    ]
