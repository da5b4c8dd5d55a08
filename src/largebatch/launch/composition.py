"""Composition of every point of the grid that a command line with ``-m`` describes.

Hydra's own multirun has no paired axes, and composes each point twice from the files. This module therefore computes
the points. Hydra composes once for each choice of presets; plain values are then set in a copy of that tree.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType, RangeSweep
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf

from largebatch.config.typed import REFUSED, defaults, explain
from largebatch.errors import UserError, choices

MOST_POINTS = 10_000  # of a grid

Tree = dict[str, Any]


@dataclass(frozen=True)
class Composed:
    """Composition of one job's overrides."""

    overrides: tuple[str, ...]
    tree: Tree  # with unresolved interpolations
    sweep: str | None  # the named grid, if any
    multirun: bool  # False without -m: one run, not a grid


@dataclass(frozen=True)
class Interval:
    """An axis ``interval(low,high)``, perhaps inside ``tag(log,...)`` or ``int(...)``."""

    key: str
    low: float
    high: float
    log: bool
    whole: bool

    def at(self, part: float) -> str:
        """Return the override at ``part`` in 0..1 of the interval, rounded to four digits."""
        value = self.low * (self.high / self.low) ** part if self.log else self.low + (self.high - self.low) * part
        return f"{self.key}={round(value) if self.whole else format(value, '.4g')}"


Axis = list[str] | Interval  # its overrides, or the interval to draw them from
Axes = dict[str, Axis]  # by key
Space = dict[str, list[Any]]  # declared values by key, as in Config.space


def store_defaults(with_options: bool = False) -> None:
    """Store the keys outside the groups, with their defaults, for Hydra to compose presets onto.

    ``with_options`` adds the option names of all choices, for shell completion.
    """
    ConfigStore.instance().store(name="schema", node=OmegaConf.create(defaults(with_options)))
    # Hydra copies its store for each composition, a sixth of its time, and for each listed group, half of --help's.
    ConfigStore.__deepcopy__ = lambda store, memo: store  # type: ignore[attr-defined]


def plain(tree: DictConfig) -> Tree:
    """Return ``tree`` as plain values, with unresolved interpolations."""
    return cast(Tree, OmegaConf.to_container(tree))


def compose_grid(arguments: list[str], conf: Path) -> list[Composed]:
    """Return every point of the grid of ``arguments``, in order and without duplicates.

    An axis is a key with several values: with commas, ``range``, ``choice`` or ``glob``. Axes come from the command
    line and from the sweep's ``hydra.sweeper.params``. The sweep's ``cases`` are a list of paired axes. The grid has,
    for each case, every combination of its axes with the other axes. ``trials`` points are drawn from all
    intervals together. A key on the command line replaces the same key of the sweep and its cases. If the command line
    has a key twice, the last counts. A point's ``space`` joins those of the file, its case and its intervals.

    Args:
        arguments: overrides, without ``-m``.
        conf: folder of the presets.

    Raises:
        UserError: if an axis has no values, or ``cases`` or ``trials`` are invalid.
        HydraException, OmegaConfBaseException: if Hydra refuses an override.
    """
    with initialize_config_dir(config_dir=str(conf), version_base="1.3"):
        _check_keys(arguments)
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        given = {override.get_key_element(): override for override in parser.parse_overrides(arguments)}
        fixed = [str(override.input_line) for override in given.values() if not override.is_sweep_override()]
        forced = by_force(fixed, conf)
        asked = {key: _axis(key, [override]) for key, override in given.items() if override.is_sweep_override()}
        if "sweeps" in asked:
            raise UserError(f"{given['sweeps'].input_line}: only one named grid is allowed")
        base = compose("config", forced, return_hydra_config=True)
        params = base.hydra.sweeper.get("params") or {}
        lines = [f"{key}={values}" for key, values in params.items() if key not in given or key in asked]
        of_file = {o.get_key_element(): _axis(o.get_key_element(), [o]) for o in parser.parse_overrides(lines)}
        grids = [case | of_file | asked for case in _cases(base.get("cases"), given, of_file, parser)]
        trials = base.get("trials")
        _check_trials(trials, grids)

        @functools.cache  # one composition for each choice of presets
        def composed(presets: tuple[str, ...]) -> Tree:
            return plain(compose("config", [*forced, *by_force(presets, conf)]))

        sweep = base.hydra.runtime.choices.get("sweeps")
        points: dict[tuple[str, ...], Space] = {}
        _check_size(grids, trials)
        for axes, space in zip(grids, _spaces(base, grids, given), strict=True):
            for point in _combinations(axes, trials):
                points.setdefault(point, space)
        jobs = []
        for point, space in points.items():
            tree = _tree(parser.parse_overrides(list(point)), composed, conf)
            jobs.append(Composed((*fixed, *point), tree | {"space": space}, sweep, multirun=True))
        return jobs


def _spaces(base: DictConfig, grids: list[Axes], given: Mapping[str, Override]) -> list[Space]:
    """Return the declared search space of each case: its intervals, its ``space``, and the file's.

    Keys of the command line are left out, unless the command line has them as intervals or in a ``space``.
    """
    file: Any = OmegaConf.to_container(base)
    own: Any = given["space"].value() if "space" in given else {}
    found = []
    for case, axes in zip(file.get("cases") or [{}], grids, strict=True):
        declared = case.get("space", {})
        for space in (file["space"], declared, own):
            if not isinstance(space, dict):
                raise UserError(f"space={space}: must be a mapping from a key to its range, such as [0.1, 10]")
        kept = {key: values for key, values in (file["space"] | declared).items() if key not in given}
        drawn = {key: [axis.low, axis.high] for key, axis in axes.items() if isinstance(axis, Interval)}
        found.append(kept | drawn | {key: file["space"][key] for key in own})
    return found


def _check_trials(trials: Any, grids: list[Axes]) -> None:
    """Raise a ``UserError`` unless ``trials`` is the number of points to draw, or None without intervals."""
    intervals = [key for axes in grids for key, axis in axes.items() if isinstance(axis, Interval)]
    if not intervals and trials is not None:
        raise UserError(f"trials={trials}: no axis is an interval, such as optimizer.lr=interval(1,10)")
    if intervals and (not isinstance(trials, int) or trials < 1):
        raise UserError(f"{intervals[0]}: an interval needs the number of points to draw. Fix: trials=16, for example")


def _check_size(grids: list[Axes], trials: Any) -> None:
    """Raise a ``UserError`` if the grid has too many points to compose. Expand nothing."""
    points = sum(
        math.prod(len(axis) for axis in axes.values() if isinstance(axis, list))
        * (trials if any(isinstance(axis, Interval) for axis in axes.values()) else 1)
        for axes in grids
    )
    if points > MOST_POINTS:
        raise UserError(f"-m: the grid has {points:,} points. Allowed: at most {MOST_POINTS:,}. Fix: several commands")


def _combinations(axes: Axes, trials: int) -> Iterator[tuple[str, ...]]:
    """Yield every combination of values, for each point drawn from the intervals.

    The points are the Halton sequence: it fills the space evenly for any number of points and has no seed. The same
    command gives the same runs, and more trials extend them.
    """
    intervals = [axis for axis in axes.values() if isinstance(axis, Interval)]
    drawn: Any = [()]
    if intervals:
        from scipy.stats import qmc

        drawn = qmc.Halton(len(intervals), scramble=False).random(trials + 1)[1:]  # the first is a corner
    for point in drawn:
        part = dict(zip(intervals, map(float, point), strict=True))
        yield from itertools.product(
            *(axis if isinstance(axis, list) else [axis.at(part[axis])] for axis in axes.values())
        )


def _axis(key: str, overrides: Sequence[Override]) -> Axis:
    """Return the axis of the values of ``overrides``, or their interval."""
    lines: list[str] = []
    for override in overrides:
        if override.is_interval_sweep():
            if len(overrides) > 1:
                raise UserError(f"cases: {key} mixes an interval with other values")
            return _interval(override)
        values = [str(override.input_line)]
        _check_range(override)
        if override.is_sweep_override():
            values = [f"{key}={value}" for value in override.sweep_string_iterator()]
        if not values:
            raise UserError(f"{override.input_line}: has no value")
        lines += values
    return lines


def _check_range(override: Override) -> None:
    """Raise a ``UserError`` for a range whose values can't be listed, or are too many."""
    if not override.is_range_sweep():
        return
    sweep = cast(RangeSweep, override.value())
    start, stop, step = (float(part or 0) for part in (sweep.start, sweep.stop, sweep.step))
    if step == 0 or not all(map(math.isfinite, (start, stop, step))):
        raise UserError(f"{override.input_line}: a range needs finite numbers, and a step other than 0")
    if (stop - start) / step > MOST_POINTS:
        raise UserError(
            f"{override.input_line}: has {(stop - start) / step:,.0f} values. Allowed: at most {MOST_POINTS:,} points"
        )


def _interval(override: Override) -> Interval:
    """Return the axis of an override like ``optimizer.lr=tag(log,interval(0.1,10))``."""
    sweep = cast(IntervalSweep, override.value())
    low, high = cast(float, sweep.start), cast(float, sweep.end)
    log = "log" in sweep.tags
    if not low < high:
        raise UserError(f"{override.input_line}: the interval's end must be above its start")
    if log and low <= 0:
        raise UserError(f"{override.input_line}: a logarithmic interval must start above 0")
    return Interval(override.get_key_element(), low, high, log, isinstance(low, int))


def _cases(cases: Any, given: Collection[str], of_file: Collection[str], parser: OverridesParser) -> list[Axes]:
    """Return the axes of each case without the keys of the command line. Without cases, return one empty case.

    A key of a case has a list of values, one value, or text as on the command line.
    """
    if cases is None:
        return [{}]
    listed = OmegaConf.to_container(cases)
    if not isinstance(listed, list) or not listed or not all(isinstance(case, dict) for case in listed):
        raise UserError("cases: must be a list of mappings from a key to its value or values")
    found = []
    for case in listed:
        axes: Axes = {}
        for key in case:
            if key not in given and key != "space":
                values = case[key] if isinstance(case[key], list) else [case[key]]
                if not values:
                    raise UserError(f"cases: {key} has no value")
                # JSON of other values than text is also Hydra's grammar.
                texts = [v if isinstance(v, str) else json.dumps(v, separators=(",", ":")) for v in values]
                axes[key] = _axis(key, parser.parse_overrides([f"{key}={text}" for text in texts]))
        if twice := axes.keys() & of_file:
            raise UserError(f"{min(twice)}: is in cases and in hydra.sweeper.params. Fix: keep only one of them")
        found.append(axes)
    return found


def _tree(point: list[Override], composed: Callable[[tuple[str, ...]], Tree], conf: Path) -> Tree:
    """Return the composition of ``point``: a copy of the tree of its presets, with its values set."""
    values = [o for o in point if _changes_a_value(o, conf) and not isinstance(o.value(), dict)]  # Hydra merges dicts
    tree = copy.deepcopy(composed(tuple(str(o.input_line) for o in point if o not in values)))
    for override in values:
        _set(tree, override.get_key_element(), override.value())
    return tree


def by_force(arguments: Sequence[str], conf: Path) -> list[str]:
    """Return the overrides, with ``++`` before each that sets a value.

    Without ``++``, Hydra refuses an option of the chosen optimizer, say, that its preset leaves out. The dataclasses of
    the choices check all keys after composition.
    """
    _check_keys(arguments)
    overrides = OverridesParser.create().parse_overrides(list(arguments))
    for override in overrides:
        if match := re.fullmatch(r"sweeps(?:=wandb/|/wandb=)(.+)", str(override.input_line)):
            fix = f"`wandb sweep {conf}/sweeps/wandb/{match[1]}.yaml` (docs/dashboards.md)"
            raise UserError(f"sweeps/wandb/{match[1]}: is a W&B sweep, not a grid. Fix: {fix}")
    return [f"++{o.input_line}" if _changes_a_value(o, conf) else str(o.input_line) for o in overrides]


def _check_keys(arguments: Sequence[str]) -> None:
    """Raise a ``UserError`` for an argument without a key, which Hydra's parser fails on."""
    for argument in arguments:
        if not re.match(r"[+~]*[^+~=]", argument):
            raise UserError(f"{argument}: has no key. Allowed: key=value")


def _changes_a_value(override: Override, conf: Path) -> bool:
    """Return False if the override chooses a preset, has its own sign (``+``, ``~``), or sets a key of Hydra."""
    key = override.get_key_element()
    names_preset = (conf / key).is_dir() and not isinstance(override.value(), dict)
    chooses = "/" in key or "@" in key or names_preset or key.startswith("hydra.")
    return override.type == OverrideType.CHANGE and not chooses


def _set(tree: Tree, key: str, value: Any) -> None:
    *path, last = key.split(".")
    node: Any = tree
    for part in path:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(f"unknown key {key}: {part} is a value without keys of its own")
    node[last] = value


def composition_error(error: Exception) -> str:
    """Return a message with the key, its value and the allowed values if ``error`` has them, else its own text."""
    if isinstance(error, REFUSED):
        return explain(error)
    text = str(error).replace("++", "")  # added by by_force
    if isinstance(error, OverrideParseException):
        reason = " ".join(line for line in text.splitlines() if not line.startswith("See "))
        key, equals, value = str(error.override).removeprefix("++").partition("=")
        if not equals or not key.strip("+~"):
            return f"{key}{equals}{value}: {reason}. Allowed: key=value"
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"{key}={value}: {reason}. Fix: if this is one value, quote it for Hydra: \"{key}='{quoted}'\""
    if match := re.search(r"Could not find '(.+)/([^'/]+)'\n\nAvailable options in '[^']+':\n((?:\t[^\n]+\n?)+)", text):
        options = match[3].split()
        return f"{match[1]}={match[2]}: {choices(match[2], options)}"
    if match := re.search(r"Could not find '(.+)/'\n\nAvailable options in '[^']+':\n((?:\t[^\n]+\n?)+)", text):
        return f"{match[1]}=: has no value; {choices('', match[2].split())}"
    if match := re.search(r"Error merging override ([^\n]+)", text):
        return f"{match[1]}: {str(error.__cause__).splitlines()[0]}"
    return " ".join(line.strip() for line in text.splitlines() if line.strip())
