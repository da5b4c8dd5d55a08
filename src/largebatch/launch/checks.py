"""Checks of a plan that look at files or at libraries, which a worker would otherwise make after its start."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import cast

from largebatch.config.arrow import find_rows
from largebatch.config.checks import check_training
from largebatch.config.datasets import Arrow, ImageFolder
from largebatch.config.imagefolder import find_images
from largebatch.config.models import TimmModel
from largebatch.config.optimizer_libraries import LibraryOptimizer, PytorchOptimizer
from largebatch.config.schema import Config
from largebatch.errors import UserError, require
from largebatch.native import cache_folder
from largebatch.runs.folder import read_json, write_atomic

# Programs that print the names of a library as JSON.
_LIST = {
    "timm": """
import json, timm, timm.optim, timm.models._registry
models = timm.list_models()
deprecated = sorted(timm.models._registry._model_entrypoints.keys() - set(models))
print(json.dumps({"models": models, "deprecated": deprecated, "optimizers": timm.optim.list_optimizers()}))
""",
    "pytorch_optimizer": """
import json, pytorch_optimizer
print(json.dumps({"optimizers": pytorch_optimizer.get_supported_optimizers()}))
""",
}
Names = dict[str, list[str]]


def check_run(config: Config) -> None:
    """Raise the ``UserError`` that the run's worker would raise, as far as it can be known without torch."""
    check_training(config, _training_images(config))
    if config.cluster.python is None:  # a container may have other libraries
        _check_names(config)


def _check_names(config: Config) -> None:
    """Raise a ``UserError`` for the name of a model or an optimizer that its library doesn't have."""
    model, optimizer = config.model, config.optimizer
    if isinstance(model, TimmModel) and (names := _names("timm")):
        architecture = model.name.partition(".")[0]  # without the tag of pre-trained weights
        if architecture not in names["models"] and architecture not in names["deprecated"]:
            raise model.unknown(names["models"])
    if isinstance(optimizer, PytorchOptimizer):
        require("optimizers")
    if isinstance(optimizer, LibraryOptimizer):
        names = _names(optimizer.library)
        if names and optimizer.name not in names["optimizers"]:
            raise optimizer.unknown(names["optimizers"])


def _training_images(config: Config) -> int | None:
    """Return the number of training images without the validation set. None: unknown before loading."""
    dataset = config.dataset
    if not isinstance(dataset, ImageFolder):
        return dataset.train_images
    if config.cluster.name == "slurm" and not os.path.exists(dataset.root):  # the nodes may have it
        return None
    train, test = _class_sizes(isinstance(dataset, Arrow), dataset.name, dataset.root)
    dataset.check_sizes(sum(train), sum(test), len(train))
    counted = replace(dataset, train_size=sum(train)).train_images
    if dataset.on_error == "skip":  # fewer images may be left
        return None if counted is None or config.batch_size <= counted else counted
    if dataset.val_fraction:
        dataset.validation_sizes(train)
    return counted


@functools.cache  # for a grid
def _class_sizes(in_shards: bool, name: str, root: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the number of images of each class of image folders or shards, in the training and test set."""
    try:
        if in_shards:
            rows = find_rows(name, Path(root))
            return rows[0].class_sizes, rows[1].class_sizes
        train, test = find_images(name, Path(root), [])
    except OSError as error:  # for example a folder without read permission
        raise UserError(f"dataset={name}: {error}; check dataset.root={root}") from error
    return tuple(map(len, train.values())), tuple(map(len, test.values()))


@functools.cache
def _names(library: str) -> Names | None:
    """Return a library's names of models and optimizers. A child process lists them, once for each version.

    None if the library can't be imported: the worker then has the error.
    """
    try:
        version = importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
    file = None
    with contextlib.suppress(OSError, UserError):  # without a cache, or with a damaged file, the library is asked again
        file = cache_folder() / f"{library}-{version}.json"
        if kept := read_json(file):
            return kept
    print(f"listing the names of {library} {version}, once", flush=True)
    listed = subprocess.run([sys.executable, "-P", "-c", _LIST[library]], capture_output=True, text=True, check=False)
    if listed.returncode:
        return None
    if file is not None:
        with contextlib.suppress(OSError):
            write_atomic(file, listed.stdout)
    return cast(Names, json.loads(listed.stdout))
