"""Composition of every point of the grid that a command line with ``-m`` describes.

Hydra's own multirun has no paired axes, and composes each point twice from the files. This module therefore computes
the points. Hydra composes once for each choice of presets; plain values are then set in a copy of that tree.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf

from largebatch.errors import UserError
from largebatch.launch.draws import Interval, drawn, interval_of

Axis = list[str] | Interval  # its overrides, or the interval to draw them from
Axes = dict[str, Axis]  # by key
Tree = dict[str, Any]


@dataclass(frozen=True)
class Composed:
    """Composition of one job's overrides."""

    overrides: tuple[str, ...]
    tree: Tree  # with unresolved interpolations
    sweep: str | None  # the named grid, if any
    multirun: bool  # False without -m: one run, not a grid


def plain(tree: DictConfig) -> Tree:
    """Return ``tree`` as plain values, with unresolved interpolations."""
    return cast(Tree, OmegaConf.to_container(tree))


def compose_grid(arguments: list[str], conf: Path) -> list[Composed]:
    """Return every point of the grid of ``arguments``, in order and without duplicates.

    An axis is a key with several values: with commas, ``range``, ``choice`` or ``glob``. Axes come from the command
    line and from the sweep's ``hydra.sweeper.params``. The sweep's ``cases`` are a list of paired axes. The grid has,
    for each case, every combination of its axes with the other axes. Intervals are drawn from together, ``trials``
    times. A key on the command line replaces the same key of the sweep and its cases. If the command line has a key
    twice, the last counts.

    Args:
        arguments: overrides, without ``-m``.
        conf: folder of the presets.

    Raises:
        UserError: if an axis has no values, or ``cases`` or ``trials`` are invalid.
        HydraException, OmegaConfBaseException: if Hydra refuses an override.
    """
    with initialize_config_dir(config_dir=str(conf), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        given = {override.get_key_element(): override for override in parser.parse_overrides(arguments)}
        fixed = [str(override.input_line) for override in given.values() if not override.is_sweep_override()]
        forced = by_force(fixed, conf)
        asked = {key: _points(override) for key, override in given.items() if override.is_sweep_override()}
        if "sweeps" in asked:
            raise UserError(f"{given['sweeps'].input_line}: only one named grid is allowed")
        base = compose("config", forced, return_hydra_config=True)
        params = base.hydra.sweeper.get("params") or {}
        lines = [f"{key}={values}" for key, values in params.items() if key not in given or key in asked]
        of_file = {override.get_key_element(): _points(override) for override in parser.parse_overrides(lines)}
        axes = of_file | asked
        cases = _cases(base.get("cases"), given, of_file, parser)
        sweep = base.hydra.runtime.choices.get("sweeps")
        composed: dict[tuple[str, ...], Tree] = {}
        trials = _trials(base.get("trials"), [case | axes for case in cases])
        points = dict.fromkeys(point for case in cases for point in _combinations(case | axes, trials))
        return [
            Composed((*fixed, *point), _tree(point, forced, conf, parser, composed), sweep, multirun=True)
            for point in points
        ]


def _trials(trials: Any, grids: list[Axes]) -> int:
    """Return the number of points to draw from the intervals; 0 without intervals."""
    intervals = [axis for axes in grids for axis in axes.values() if isinstance(axis, Interval)]
    if not intervals:
        if trials is not None:
            raise UserError(f"trials={trials}: no axis is an interval, such as optimizer.lr=interval(1,10)")
        return 0
    if not isinstance(trials, int) or trials < 1:
        key = intervals[0].key
        raise UserError(f"{key}: an interval needs the number of points to draw. Fix: trials=16, for example")
    return trials


def _combinations(axes: Axes, trials: int) -> Iterator[tuple[str, ...]]:
    """Yield every combination of values, for each point drawn from the intervals."""
    intervals = [axis for axis in axes.values() if isinstance(axis, Interval)]
    if not intervals:
        yield from itertools.product(*(values for values in axes.values() if isinstance(values, list)))
        return
    for point in drawn(intervals, trials):
        of_point = dict(zip((interval.key for interval in intervals), point, strict=True))
        yield from itertools.product(
            *(values if isinstance(values, list) else [of_point[key]] for key, values in axes.items())
        )


def _points(override: Override) -> Axis:
    """Return the overrides of an axis, one for each value, or its interval."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if override.is_interval_sweep():
        return interval_of(override)
    key = override.get_key_element()
    lines = [f"{key}={value}" for value in override.sweep_string_iterator()]
    if not lines:
        raise UserError(f"{override.input_line}: has no value")
    return lines


def _cases(cases: Any, given: Collection[str], of_file: Collection[str], parser: OverridesParser) -> list[Axes]:
    """Return the axes of each case without the keys of the command line. Without cases, return one empty case."""
    if cases is None:
        return [{}]
    listed = OmegaConf.to_container(cases)
    if not isinstance(listed, list) or not listed or not all(isinstance(case, dict) for case in listed):
        raise UserError("cases: must be a list of mappings from a key to its value or values")
    found = []
    for case in listed:
        axes = {key: _of_case(key, value, parser) for key, value in case.items() if key not in given}
        if twice := axes.keys() & of_file:
            raise UserError(f"{min(twice)}: is in cases and in hydra.sweeper.params. Fix: keep only one of them")
        found.append(axes)
    return found


def _of_case(key: str, value: Any, parser: OverridesParser) -> Axis:
    """Return the axis of ``key`` in a case: a list of values, one value, or text as on the command line."""
    values = value if isinstance(value, list) else [value]
    if not values:
        raise UserError(f"cases: {key} has no value")
    axes = [_points(override) for override in parser.parse_overrides([f"{key}={_written(value)}" for value in values])]
    lines = [line for axis in axes if isinstance(axis, list) for line in axis]
    intervals = [axis for axis in axes if isinstance(axis, Interval)]
    if not intervals:
        return lines
    if lines or len(intervals) > 1:
        raise UserError(f"cases: {key} mixes an interval with other values")
    return intervals[0]


def _written(value: Any) -> str:
    """Return a YAML value in Hydra's override grammar."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _tree(
    point: tuple[str, ...],
    fixed: list[str],
    conf: Path,
    parser: OverridesParser,
    composed: dict[tuple[str, ...], Tree],
) -> Tree:
    """Return the composition of ``fixed`` and ``point``. ``composed`` caches the tree of each choice of presets."""
    values: dict[str, Any] = {}
    presets = []
    for line, override in zip(point, parser.parse_overrides(list(point)), strict=True):
        if _sets_a_value(override, conf):
            values[override.get_key_element()] = override.value()
        else:
            presets.append(line)
    key = tuple(presets)
    if key not in composed:
        composed[key] = plain(compose("config", [*fixed, *by_force(presets, conf)]))
    tree = copy.deepcopy(composed[key])
    for name, value in values.items():
        _set(tree, name, value)
    return tree


def by_force(arguments: list[str], conf: Path) -> list[str]:
    """Return the overrides, with ``++`` before each that sets a value.

    Without ``++``, Hydra refuses an option of the chosen optimizer, say, that its preset leaves out. The dataclasses of
    the choices check all keys after composition.
    """
    overrides = OverridesParser.create().parse_overrides(arguments)
    for override in overrides:
        if match := re.fullmatch(r"sweeps(?:=wandb/|/wandb=)(.+)", str(override.input_line)):
            file = f"sweeps/wandb/{match[1]}"
            raise UserError(f"{file}: is a W&B sweep, not a grid. Fix: `wandb sweep {file}.yaml` (docs/dashboards.md)")
    return [f"++{o.input_line}" if _changes_a_value(o, conf) else str(o.input_line) for o in overrides]


def _changes_a_value(override: Override, conf: Path) -> bool:
    """Return False if the override chooses a preset, has its own sign (``+``, ``~``), or sets a key of Hydra."""
    key = override.get_key_element()
    names_preset = (conf / key).is_dir() and not isinstance(override.value(), dict)
    chooses = "/" in key or "@" in key or names_preset or key.startswith("hydra.")
    return override.type == OverrideType.CHANGE and not chooses


def _sets_a_value(override: Override, conf: Path) -> bool:
    """Return False if Hydra must compose the override: a preset, a sign or a mapping to merge."""
    return _changes_a_value(override, conf) and not isinstance(override.value(), dict)


def _set(tree: Tree, key: str, value: Any) -> None:
    *path, last = key.split(".")
    node: Any = tree
    for part in path:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(f"unknown key {key}: {part} is a value without keys of its own")
    node[last] = value
