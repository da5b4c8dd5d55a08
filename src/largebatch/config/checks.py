"""Checks of a configuration before the run starts, without torch or the data."""

from __future__ import annotations

import re
from dataclasses import MISSING, replace
from typing import Any

from largebatch.config.batch import plan_batch, plan_training
from largebatch.config.custom import custom_choices
from largebatch.config.options import problems_of
from largebatch.config.schema import ClusterConfig, Config
from largebatch.errors import UserError


def validate(config: Config) -> None:
    """Raise one ``UserError`` that lists every problem of ``config``."""
    problems = [
        *problems_of(config),
        *(problem for choice in custom_choices(config) for problem in choice.problems_in_source()),
        *config.dataset.problems(config),
        *config.optimizer.problems(config),
        *config.lr_scaling.problems(config.optimizer),
        *config.schedule.problems(config),
        *config.mode.problems(config),
        *_check_length(config),
        *_check_cluster(config.cluster),
        *_check_runs_dir(config),
        *_check_batch(config),
        *_check_space(config),
    ]
    if problems:
        raise UserError("\n".join(problems))


def _check_length(config: Config) -> list[str]:
    if config.epochs is not None and config.steps is not None:
        return [
            f"epochs={config.epochs} and steps={config.steps}: only one may be set. "
            "Fix: leave one out, or set it to null if a preset sets it"
        ]
    return []


# Keys without a meaning on SLURM, and the fix.
_LOCAL_KEYS = {"devices": "leave it out, since SLURM chooses the GPUs", "parallel": "set cluster.array_parallelism"}
_SHARED_KEYS = ("name", "processes", "device", "threads", "hang_seconds")


def _check_cluster(cluster: ClusterConfig) -> list[str]:
    if cluster.name == "local":
        default = ClusterConfig()
        return [
            f"cluster.{key}={value}: only cluster=slurm has this key. Fix: leave it out, or set cluster=slurm"
            for key, value in vars(cluster).items()
            if key not in (*_SHARED_KEYS, *_LOCAL_KEYS) and value != getattr(default, key)
        ]
    problems = [
        f"cluster.{key}={getattr(cluster, key)}: only cluster=local has this key. Fix: {fix}"
        for key, fix in _LOCAL_KEYS.items()
        if getattr(cluster, key) is not None
    ]
    texts = {key: value for key, value in vars(cluster).items() if isinstance(value, str)}
    texts |= {
        "setup": "".join(map(str, cluster.setup)),
        "options": "".join(f"{k}{v}" for k, v in cluster.options.items()),
    }
    problems += [
        f"cluster.{key}={text!r}: has a line break or another control character, which would end its line of the "
        "script. Fix: remove it, or put more commands into cluster.setup as further elements"
        for key, text in texts.items()
        if any(ord(character) < 32 or ord(character) == 127 for character in text)
    ]
    problems += [
        f"cluster.options.{key}={value}: invalid. Allowed: sbatch's long options without dashes, with a text, number, "
        "true, false or null"
        for key, value in cluster.options.items()
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", str(key)) or not isinstance(value, str | int | float | None)
    ]
    given, nodes, each = cluster.processes, cluster.nodes, cluster.processes_per_node
    if given is not None and nodes >= 1 and (given % nodes or each not in (None, given // nodes)):
        problems.append(
            f"cluster.processes={given}: must be cluster.nodes={nodes} times cluster.processes_per_node"
            f"{f'={each}' if each else ''}. Fix: leave cluster.processes out"
        )
    if cluster.time_limit is not None and cluster.signal_seconds >= 60 * cluster.time_limit:
        problems.append(
            f"cluster.signal_seconds={cluster.signal_seconds}: must be shorter than cluster.time_limit="
            f"{cluster.time_limit} (minutes), else SLURM stops a run as soon as it starts. Fix: shorten it"
        )
    return problems


def _check_runs_dir(config: Config) -> list[str]:
    if any(ord(character) < 32 or ord(character) == 127 for character in config.runs_dir):
        return [f"runs_dir={config.runs_dir!r}: has a line break or another control character. Fix: another folder"]
    return []


def _check_batch(config: Config) -> list[str]:
    processes, together = config.cluster.processes, config.optimizer.samples_together
    sizes = (config.batch_size, config.micro_batch, config.batch_norm_size, processes, together)
    if any(isinstance(size, int) and size < 1 for size in sizes):
        return []  # problems_of names it
    try:
        if processes is None:
            plan_batch(config.batch_size, 1, config.micro_batch, together)
        else:
            plan_training(replace(config), processes)
    except UserError as error:
        return [str(error)]
    return []


def _check_space(config: Config) -> list[str]:
    """Return a problem for each key of the search space that the run lacks, or whose value isn't in its space."""
    problems = []
    for key, declared in config.space.items():
        value: Any = config
        for part in key.split("."):
            value = value.get(part, MISSING) if isinstance(value, dict) else getattr(value, part, MISSING)
        numbers = isinstance(declared, list) and not any(isinstance(one, bool | str | list) for one in declared)
        if value is MISSING:
            problems.append(f"space: the run has no key {key}. Fix: declare it only in the cases that have it")
        elif not isinstance(declared, list) or len(declared) < 2 or (numbers and not _is_range(declared)):
            problems.append(f"space: {key}={declared}: invalid. Allowed: [low, high] for numbers, else all values")
        elif not _is_in(value, declared, numbers):
            problems.append(f"{key}={value}: outside of its declared space {declared}. Fix: widen the space")
    return problems


def _is_range(numbers: list[Any]) -> bool:
    return len(numbers) == 2 and numbers[0] < numbers[1]


def _is_in(value: Any, declared: list[Any], numbers: bool) -> bool:
    """Return True if ``value`` is in a range of numbers, with 0.1 % for the rounding of drawn values, or in a list."""
    if not numbers:
        return value in declared
    margin = 1e-3 * max(map(abs, declared))
    return isinstance(value, int | float) and declared[0] - margin <= value <= declared[1] + margin
