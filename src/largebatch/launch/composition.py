"""From a command line with ``-m`` to every point of its grid, composed.

Hydra composes; which points there are is worked out here, because its own multirun knows no paired axes and composes
each point twice from the files. Here the files are read once for each choice of presets, and a plain value is set in a
copy of what came out.
"""

from __future__ import annotations

import copy
import itertools
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

Axis = list[str] | Interval  # the overrides that it is made of, or where they are drawn from
Axes = dict[str, Axis]  # by their keys
Tree = dict[str, Any]


@dataclass(frozen=True)
class Composed:
    """What Hydra made of one job's overrides."""

    overrides: tuple[str, ...]
    tree: Tree  # interpolations are unresolved
    sweep: str | None  # the named grid, where one was chosen
    multirun: bool  # without -m, one point of a grid only is composed


def plain(tree: DictConfig) -> Tree:
    """``tree`` as plain values, their interpolations unresolved."""
    return cast(Tree, OmegaConf.to_container(tree))


def compose_grid(arguments: list[str], conf: Path) -> list[Composed]:
    """Every point of the grid that ``arguments`` ask for, in order, each once.

    Axes are values with commas (also ``range``, ``choice``, ``glob``), of the command line and of the chosen sweep's
    ``hydra.sweeper.params``. The sweep's ``cases`` are a list of axes that belong together: the grid has every
    combination of axes in each case. Axes that are intervals are drawn from together, ``trials`` times. A key on the
    command line replaces the file's, in its cases too; of a key given twice there the last counts.

    Args:
        arguments: overrides, without ``-m``.
        conf: the folder of the presets.

    Raises:
        UserError: for a grid that isn't a list of values.
        HydraException, OmegaConfBaseException: for what Hydra refuses.
    """
    with initialize_config_dir(config_dir=str(conf), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        given = {override.get_key_element(): override for override in parser.parse_overrides(arguments)}
        fixed = [str(override.input_line) for override in given.values() if not override.is_sweep_override()]
        forced = by_force(fixed, conf)
        asked = {key: _points(override) for key, override in given.items() if override.is_sweep_override()}
        if "sweeps" in asked:
            raise UserError(f"{given['sweeps'].input_line}: one named grid at a time")
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
    """How often intervals are drawn from; 0 where there are none."""
    intervals = [axis for axes in grids for axis in axes.values() if isinstance(axis, Interval)]
    if not intervals:
        if trials is not None:
            raise UserError(f"trials={trials}: no axis is an interval to draw from, as optimizer.lr=interval(1,10) is")
        return 0
    if not isinstance(trials, int) or trials < 1:
        key = intervals[0].key
        raise UserError(f"{key}: is an interval, and trials must say how many points are drawn, as in trials=16")
    return trials


def _combinations(axes: Axes, trials: int) -> Iterator[tuple[str, ...]]:
    """Every combination of values, with each point that is drawn from the intervals."""
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
    """The override of each value of an axis, or the interval that it is."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if override.is_interval_sweep():
        return interval_of(override)
    key = override.get_key_element()
    lines = [f"{key}={value}" for value in override.sweep_string_iterator()]
    if not lines:
        raise UserError(f"{override.input_line}: names no value")
    return lines


def _cases(cases: Any, given: Collection[str], of_file: Collection[str], parser: OverridesParser) -> list[Axes]:
    """The axes of each case but those that the command line has; one case without any where there are none."""
    if cases is None:
        return [{}]
    listed = OmegaConf.to_container(cases)
    if not isinstance(listed, list) or not listed or not all(isinstance(case, dict) for case in listed):
        raise UserError("cases: must be a list of mappings from a key to its value or values")
    found = []
    for case in listed:
        axes = {key: _of_case(key, value, parser) for key, value in case.items() if key not in given}
        if twice := axes.keys() & of_file:
            raise UserError(f"{min(twice)}: both in cases and in hydra.sweeper.params; an axis is in one of them")
        found.append(axes)
    return found


def _of_case(key: str, value: Any, parser: OverridesParser) -> Axis:
    """What a case has for ``key``: a list of values, one value, or text as on the command line."""
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
    """A value of YAML as Hydra's grammar has it."""
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
    """The composition of ``fixed`` and ``point``. ``composed`` keeps that of each choice of presets."""
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
    """Return overrides with ``++`` before each that sets a value.

    Hydra refuses a key that the chosen presets lack, though the chosen optimizer, say, has it. Which keys there are is
    checked after composition, against the dataclasses of the choices.
    """
    overrides = OverridesParser.create().parse_overrides(arguments)
    return [f"++{o.input_line}" if _changes_a_value(o, conf) else str(o.input_line) for o in overrides]


def _changes_a_value(override: Override, conf: Path) -> bool:
    """Return False for an override that chooses a preset, has a sign of its own, or is about Hydra itself."""
    key = override.get_key_element()
    names_preset = (conf / key).is_dir() and not isinstance(override.value(), dict)
    chooses = "/" in key or "@" in key or names_preset or key.startswith("hydra.")
    return override.type == OverrideType.CHANGE and not chooses


def _sets_a_value(override: Override, conf: Path) -> bool:
    """Return False for what Hydra must compose: a preset, a sign, a mapping to merge."""
    return _changes_a_value(override, conf) and not isinstance(override.value(), dict)


def _set(tree: Tree, key: str, value: Any) -> None:
    *path, last = key.split(".")
    node: Any = tree
    for part in path:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(f"unknown key {key}: {part} is a value and holds no further keys")
    node[last] = value
