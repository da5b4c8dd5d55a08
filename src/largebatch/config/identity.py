"""A run's identity: a hash over everything in its configuration that can change the result, and its name."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from largebatch.config.datasets import DATASETS
from largebatch.config.modes import MODES
from largebatch.config.schema import Config

# Keys that aren't part of the identity, each with the reason. Every other key is.
NOT_DECISIVE = {
    "cluster": "devices, processes and SLURM's options are where a run trains",
    "tracker": "logging observes a run",
    "checkpoint": "resuming is exact",
    "runs_dir": "where results are written",
    "rerun": "an instruction to the launcher",
    "dry_run": "an instruction to the launcher",
    "profile": "observes a run",
    "dataset.root": "the same files elsewhere; decisive for data sets that are named by their root",
    "dataset.download": "how files come here",
    "dataset.verify": "a check of the files",
    "dataset.workers": "the number of processes that decode",
    "dataset.location": "where pixels are kept",
    "dataset.default_epochs": "contained in epochs",
    "mode.default_epochs": "contained in epochs",
    "lr_scaling.force": "permits a rule and changes nothing in it",
    "dataset.views": "decisive for modes that take more than one view",
}


def identity(config: Config) -> str:
    """Return eight hex digits over everything that can change the result, and nothing else."""
    return _hash(decisive(dataclasses.asdict(config)))


def setting_hash(config: Config) -> str:
    """Return ``identity`` without the seed: the same for all seeds of a setting."""
    tree = decisive(dataclasses.asdict(config))
    del tree["seed"]
    return _hash(tree)


def decisive(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration's tree that can change the result: all keys but ``NOT_DECISIVE``."""
    kept = copy.deepcopy(tree)
    dataset, mode = tree["dataset"]["name"], tree["mode"]["name"]
    decisive_here = {"dataset.root": DATASETS[dataset].named_by_root, "dataset.views": MODES[mode].views > 1}
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
    """Return the name that the runs of a setting share over seeds: a readable prefix and ``setting_hash``."""
    return _joined(*_choices(config), setting_hash(config))


def _choices(config: Config) -> tuple[str, ...]:
    return (
        Path(config.dataset.root).name if config.dataset.named_by_root else config.dataset.name,
        config.model.name,
        config.mode.name,
        config.optimizer.name,
        config.schedule.name,
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
