"""A run's identity: a hash over everything in its configuration that can change the result, and its name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from largebatch.config.schema import Config

# Keys that can't change a run's result, and so aren't part of what it is.
_NOT_IDENTITY = ("cluster", "tracker", "checkpoint", "runs_dir", "rerun", "dry_run", "profile")
_NOT_IDENTITY_DATASET = ("root", "download", "verify", "workers", "location", "default_epochs")
# Keys that came after the first version, at what that did: left out, so that its runs keep their names.
_LATER_KEYS = {"compile": "auto"}
_LATER_DATASET_KEYS = {"on_error": "stop"}
# Of lars and tvlars:
_LATER_OPTIONS = {"denominator": "norm_of_sum", "lr_in_momentum": False, "larc": False, "eps": 0.0}


def identity(config: Config) -> str:
    """Eight hex digits over everything that can change the result, and nothing else.

    Keys that are None are left out, so that a later version's new option doesn't rename the runs that don't use it.
    An ``imagefolder`` is known by its folder, every other data set by its name.
    """
    return _hash(decisive(dataclasses.asdict(config)))


def setting_hash(config: Config) -> str:
    """As ``identity``, without the seed."""
    tree = decisive(dataclasses.asdict(config))
    del tree["seed"]
    return _hash(tree)


def decisive(tree: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration's tree that can change the result; of a tree of an earlier version too."""
    kept = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    dataset, optimizer = kept["dataset"], kept["optimizer"]
    for key in _NOT_IDENTITY:
        kept.pop(key, None)
    for key in _NOT_IDENTITY_DATASET:
        if not (key == "root" and dataset["name"] == "imagefolder"):
            dataset.pop(key, None)
    kept.get("lr_scaling", {}).pop("force", None)  # it lets a run be, and changes nothing in it
    kept["mode"].pop("default_epochs", None)
    if kept["mode"]["name"] != "bt":
        dataset.pop("views", None)
    later: list[tuple[dict[str, Any], dict[str, Any]]] = [(kept, _LATER_KEYS), (dataset, _LATER_DATASET_KEYS)]
    if optimizer["name"] in ("lars", "tvlars"):
        later.append((optimizer, _LATER_OPTIONS))
    for branch, defaults in later:
        for key, default in defaults.items():
            if branch.get(key) == default:
                branch.pop(key, None)
    return kept


def run_name(config: Config) -> str:
    """The run folder's name: a readable prefix and the identity."""
    return _joined(*_choices(config), f"s{config.seed}", identity(config))


def setting_name(config: Config) -> str:
    """What the runs of one setting with other seeds share: a readable prefix and ``setting_hash``."""
    return _joined(*_choices(config), setting_hash(config))


def _choices(config: Config) -> tuple[str, ...]:
    return (
        config.dataset.name if config.dataset.name != "imagefolder" else Path(config.dataset.root).name,
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
    canonical = json.dumps(without_none(tree), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def without_none(tree: Any) -> Any:
    """Nested dicts without the keys that are None."""
    if isinstance(tree, dict):
        return {key: without_none(value) for key, value in tree.items() if value is not None}
    return tree
