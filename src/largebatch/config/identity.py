"""Identity of a run, a hash over every key that can change the result; and the run's name."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from typing import Any

from largebatch.config.datasets import dataset_kind
from largebatch.config.modes import MODES
from largebatch.config.schema import Config

# Keys outside the identity, each with the reason. Every other key is part of it.
NOT_DECISIVE = {
    "model.weights": "place of the file; model.weights_hash is decisive",
    "cluster": "devices, processes and SLURM's options decide where a run trains",
    "micro_batch": "divides a step; batch_norm_size has the effect of this division and of processes",
    "sync_bn": "a way to normalise over batch_norm_size images",
    "tracker": "logging observes a run",
    "checkpoint": "resuming is exact",
    "instruments": "measurements change nothing of the training",
    "runs_dir": "folder of the results",
    "rerun": "an instruction to the launcher",
    "dry_run": "an instruction to the launcher",
    "profile": "observes a run",
    "cuda_graphs": "starts the same kernels",
    "space": "declares the values that a search may choose",
    "confirms": "decides if a run chooses or reports",
    "dataset.root": "folder of the files; decisive for data sets with ``root_decides``",
    "dataset.download": "permission to download files",
    "dataset.verify": "a check of the files",
    "dataset.workers": "number of decoding processes",
    "dataset.location": "memory that holds the pixels",
    "dataset.default_epochs": "part of epochs",
    "mode.default_epochs": "part of epochs",
    "lr_scaling.force": "permission to use a rule",
    "dataset.views": "decisive for modes that take more than one view",
}


_LONGEST = 40  # characters of a choice in a run's name: some file systems allow 143 bytes


def identity(config: Config) -> str:
    """Return eight hex digits, the hash over all keys that can change the result."""
    return _hash(decisive(dataclasses.asdict(config)))


def setting_hash(config: Config) -> str:
    """Return ``identity`` without the seed: the same for all seeds of a setting."""
    tree = decisive(dataclasses.asdict(config))
    del tree["seed"]
    return _hash(tree)


def decisive(tree: dict[str, Any]) -> dict[str, Any]:
    """Return ``tree`` without the keys that can't change the result (``NOT_DECISIVE``)."""
    kept = copy.deepcopy(tree)
    dataset, mode = dataset_kind(tree["dataset"]), MODES[tree["mode"]["name"]]
    assert dataset is not None
    decisive_here = {"dataset.root": dataset.root_decides, "dataset.views": mode.views > 1}
    for key in NOT_DECISIVE:
        if not decisive_here.get(key):
            *path, last = key.split(".")
            node = kept
            for part in path:
                node = node.get(part, {})
            node.pop(last, None)
    return kept


def run_name(config: Config) -> str:
    """Return the run folder's name: a readable prefix and the identity."""
    return _joined(*_choices(config), f"s{config.seed}", identity(config))


def setting_name(config: Config) -> str:
    """Return the name of a setting, the same for all seeds: a readable prefix and ``setting_hash``."""
    return _joined(*_choices(config), setting_hash(config))


def _choices(config: Config) -> tuple[str, ...]:
    return (
        config.dataset.label[:_LONGEST],
        config.model.name[:_LONGEST],
        config.mode.name,
        config.optimizer.name[:_LONGEST],
        config.schedule.name[:_LONGEST],
        f"b{config.batch_size}",
        f"lr{config.optimizer.lr:g}",
    )


def _joined(*parts: str) -> str:
    return "-".join(re.sub(r"[^A-Za-z0-9_.+]", "_", part) for part in parts)


def _hash(tree: dict[str, Any]) -> str:
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def without_none(tree: Any) -> Any:
    """Return nested dicts without the keys that are None."""
    if isinstance(tree, dict):
        return {key: without_none(value) for key, value in tree.items() if value is not None}
    return tree
