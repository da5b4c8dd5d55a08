"""The checkpoint of ``start_from``: which run has it, and if a training can go on from it with the run's options."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from largebatch.config.identity import run_name
from largebatch.config.optimizer_libraries import structure
from largebatch.config.schema import Config
from largebatch.config.typed import read_frozen
from largebatch.errors import UserError
from largebatch.runs.folder import RunFolder, checkpoint_path, newest_first, step_of
from largebatch.runs.table import find_runs

_GROUPS = ("dataset", "model", "optimizer", "mode")  # equal in both runs


def resolve_start(config: Config) -> None:
    """Write ``start_from`` with the whole name of its run, and check that it has a checkpoint of that step.

    A run that has begun needs the checkpoint no longer.

    Raises:
        UserError: there is no such run or step, or it trained another network, or with another optimizer.
    """
    given = config.start_from
    if given is None:
        return
    wanted, _, digits = given.rpartition("@")
    if not wanted or not digits.isdecimal():
        raise UserError(f"start_from={given}: must be RUN@STEP, the beginning of a run's name and an optimizer step")
    runs_dir, step = Path(config.runs_dir), int(digits)
    if RunFolder(runs_dir / run_name(config)).has_progress():
        return
    source = _source(wanted, runs_dir, given)
    config.start_from = f"{source.name}@{step}"
    if RunFolder(runs_dir / run_name(config)).has_progress():
        return
    frozen = _frozen(source.config)
    for group in _GROUPS:
        name, theirs = getattr(config, group).name, frozen[group].name
        if name != theirs:
            raise UserError(
                f"start_from={given}: {source.name} has {group}={theirs}, this run {group}={name}. Fix: "
                f"{group}={theirs}, or model.weights=RUN for the weights alone"
            )
    _check_optimizer(config, cast(dict[str, Any], OmegaConf.to_container(frozen.optimizer)), source.name)
    if not checkpoint_path(source.checkpoints, step).exists():
        steps = sorted(map(step_of, newest_first(source.checkpoints)))
        there = ", ".join(f"{one:,}" for one in steps) or "none"
        fix = f"train it with checkpoint.keep_at=[{step}] rerun=true"
        if not 0 < step <= source.read_status().get("steps", step):
            fix = "a step of its training"
        raise UserError(
            f"start_from={given}: {source.name} has no checkpoint of step {step:,}. There are: {there}. Fix: {fix}"
        )


def _check_optimizer(config: Config, theirs: dict[str, Any], source: str) -> None:
    """Check that options that make another algorithm are equal. Another algorithm has another state.

    Raises:
        UserError: if one differs.
    """
    ours = asdict(config.optimizer)
    mine, other = structure(ours), structure(theirs)
    for name in {**mine, **other}:
        if mine.get(name) == other.get(name):
            continue
        key = f"optimizer.{name}" if name in ours else f"optimizer.options.{name}"
        now, then = (_text({**(tree.get("options") or {}), **tree}.get(name)) for tree in (ours, theirs))
        raise UserError(
            f"start_from={config.start_from}: {source} has {key}={then}, this run {key}={now}. Fix: {key}={then}, or "
            "model.weights=RUN for the weights alone"
        )


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@functools.cache  # for a grid
def _frozen(path: Path) -> DictConfig:
    return read_frozen(path)


def _source(wanted: str, runs_dir: Path, given: str) -> RunFolder:
    """Return the run whose name or digits begin with ``wanted``; if there are several, the one that isn't a branch."""
    try:
        if "/" in wanted:
            raise UserError(f"{wanted}: a path. Allowed: runs in runs_dir={runs_dir}, by name")
        found = find_runs(wanted, runs_dir)
    except UserError as error:
        raise UserError(f"start_from={error}") from None
    own = [run for run in found if _frozen(run.config).get("start_from") is None] if len(found) > 1 else found
    if len(own) != 1:
        names = ", ".join(run.name for run in (own or found)[:10])
        raise UserError(f"start_from={given}: matches {len(own or found)} runs: {names}. Fix: give more of the name")
    return own[0]
