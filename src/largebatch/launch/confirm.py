"""Jobs of ``largebatch confirm``: frozen configurations again, with other seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from largebatch.config.identity import decisive, without_none
from largebatch.config.typed import REFUSED, from_composed, read_frozen
from largebatch.errors import UserError
from largebatch.launch.composition import Composed, Tree, by_force, composition_error, plain, store_defaults
from largebatch.launch.presets import presets

_LABEL = ("optimizer.name", "schedule.name", "batch_size", "optimizer.lr")
_OURS = {"seed": "--seeds N sets the number of seeds", "confirms": "leave it out", "runs_dir": "leave it out"}


def confirmation_jobs(
    configs: Sequence[Path], seeds: Sequence[int], runs_dir: Path, arguments: Sequence[str]
) -> list[Composed]:
    """Return a job for each configuration and seed.

    A job has all keys of the frozen configuration but ``cluster``, which ``arguments`` give as for ``launch.py``.

    Args:
        configs: frozen ``config.yaml`` of finished runs.
        runs_dir: folder of the jobs' runs.
        arguments: overrides of keys that can't change the result, such as ``cluster=slurm``.

    Raises:
        UserError: Hydra can't compose the overrides, or they change a setting.
    """
    composed, keys = compose_overrides(arguments)
    for key in keys.keys() & _OURS:
        raise UserError(f"{keys[key]}: largebatch confirm sets this key. Fix: {_OURS[key]}")
    jobs = []
    for path in configs:
        tree = frozen_with(path, composed, ("cluster", *keys)) | {"confirms": True, "runs_dir": str(runs_dir)}
        label = [f"{key}={OmegaConf.select(OmegaConf.create(tree), key)}" for key in _LABEL]
        jobs += [Composed((*label, f"seed={seed}"), tree | {"seed": seed}, None, multirun=True) for seed in seeds]
    return jobs


def compose_overrides(arguments: Sequence[str]) -> tuple[DictConfig, dict[str, str]]:
    """Compose the program's configuration with overrides. Return it, and the text of each override by its key.

    Raises:
        UserError: Hydra can't compose the overrides.
    """
    store_defaults()
    try:
        with initialize_config_dir(config_dir=str(presets()), version_base="1.3"):
            given = OverridesParser.create().parse_overrides(list(arguments))
            composed = compose("config", by_force(arguments, presets()))
    except (HydraException, *REFUSED, ValueError) as error:
        raise UserError(composition_error(error)) from error
    return composed, {override.get_key_element(): str(override.input_line) for override in given}


def frozen_with(path: Path, composed: DictConfig, keys: Iterable[str]) -> Tree:
    """Return the frozen configuration in ``path`` with the values of ``keys`` from ``composed``.

    Raises:
        UserError: the file can't be read, or this makes another setting.
    """
    frozen = read_frozen(path)
    before = plain(frozen)
    for key in keys:
        OmegaConf.update(frozen, key, OmegaConf.select(composed, key), merge=False)
    tree = plain(frozen)
    _check_setting(path, before, tree)
    return tree


def _check_setting(path: Path, frozen: Tree, tree: Tree) -> None:
    """Raise a ``UserError`` if ``tree`` makes another setting than the frozen configuration."""
    before, after = (without_none(decisive(one)) for one in (frozen, dataclasses.asdict(from_composed(tree))))
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    if changed:
        raise UserError(
            f"{', '.join(changed)}: differs from the setting of {path}. Fix: override only keys that can't "
            "change a result (cluster, tracker, checkpoint), and use the version of the program that wrote the run"
        )
