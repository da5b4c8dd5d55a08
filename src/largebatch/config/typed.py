"""Typed configurations of trees: of what Hydra composed, and of a run's frozen ``config.yaml``."""

from __future__ import annotations

import copy
import functools
import re
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import SafeLoader, YAMLError

from largebatch.config.custom import complete
from largebatch.config.schema import CHOICES, LIBRARIES, Config
from largebatch.errors import UserError, choices, nearest

# Errors of OmegaConf. An integer above 1e308 in place of a float is an OverflowError.
REFUSED = (OmegaConfBaseException, OverflowError)
# YAML 1.1 reads 4:00:00 as 14,400, a number to the base 60. Here it stays text, as in SLURM's time limits.
_BASE_60 = ("tag:yaml.org,2002:str", re.compile("[0-9]+(:[0-5]?[0-9])+$"))
SafeLoader.yaml_implicit_resolvers = {
    first: [_BASE_60, *kinds] if first in "0123456789" else kinds
    for first, kinds in SafeLoader.yaml_implicit_resolvers.items()
}


def from_composed(composed: DictConfig | dict[str, Any]) -> Config:
    """Return the typed configuration of a composed or frozen tree, with all defaults and absolute paths.

    Raises:
        UserError: for an unknown key, a missing value or a value of the wrong type. The message names the key.
    """
    tree: Any = None
    schema = None
    try:
        if not isinstance(composed, DictConfig) and "${" in repr(composed):  # maybe interpolations
            composed = OmegaConf.create(composed)
        if isinstance(composed, DictConfig):
            tree = OmegaConf.to_container(composed, resolve=True)
        else:
            tree = copy.deepcopy(composed)
        for key in ("cases", "trials"):  # keys of a grid, not of a run
            tree.pop(key, None)
        for group in CHOICES:
            if isinstance(given := tree.get(group), dict) and given.get("library") == "custom":
                complete(group, given)
        tree = _escaped(tree)
        schema, standard = _schema(*(_chosen(group, tree.get(group)) for group in CHOICES))
        config = OmegaConf.to_object(OmegaConf.merge(schema, _without(standard, tree)))
    except REFUSED as error:
        raise UserError(explain(error, tree, schema)) from None
    assert isinstance(config, Config)
    if config.epochs is None and config.steps is None:
        config.epochs = config.mode.length(config.dataset.default_epochs)
    config.runs_dir = str(Path(config.runs_dir).expanduser().absolute())
    if config.dataset.root:
        config.dataset.root = str(Path(config.dataset.root).expanduser().absolute())
    return config


def defaults(with_options: bool = False) -> dict[str, Any]:
    """Return the keys outside the groups of ``CHOICES``, with defaults. Hydra composes presets onto them.

    ``with_options`` adds the option names of all choices, for shell completion.
    """
    tree = asdict(Config())
    for group, kinds in CHOICES.items():
        del tree[group]
        if with_options:
            every = (*kinds.values(), *LIBRARIES[group].values())
            tree[group] = {option.name: None for kind in every for option in fields(kind)}
    return tree


def _chosen(group: str, given: Any) -> Any:
    """Return the dataclass that ``library`` or else ``name`` selects.

    Raises:
        UserError: if the name is missing or unknown.
    """
    if not isinstance(given, dict) or given.get("name") in (None, "???"):
        raise UserError(f"{group}.name has no value. Fix: choose a preset with {group}=NAME")
    if kind := LIBRARIES[group].get(str(given.get("library"))):
        return kind
    name = str(given["name"])
    if name not in CHOICES[group]:
        any_timm = f" ({group}=timm allows any timm name)" if "timm" in LIBRARIES[group] else ""
        raise UserError(f"{group}.name={name}: {choices(name, CHOICES[group])}{any_timm}")
    return CHOICES[group][name]


@functools.cache
def _schema(*kinds: Any) -> tuple[DictConfig, Any]:
    """Return the schema of a choice for each group, and its defaults as plain values."""
    schema: DictConfig = OmegaConf.structured(Config)
    for group, kind in zip(CHOICES, kinds, strict=True):
        schema[group] = OmegaConf.structured(kind)
    return schema, OmegaConf.to_container(schema)


def _without(defaults: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Return ``tree`` without the values that are the defaults already, because OmegaConf merges them slowly."""
    found = {}
    for key, value in tree.items():
        default = defaults.get(key)
        if isinstance(default, dict) and isinstance(value, dict):
            if left := _without(default, value):
                found[key] = left
        elif key not in defaults or repr(value) != repr(default):  # 1, 1.0 and True are equal
            found[key] = value
    return found


def load_config(path: Path) -> Config:
    """Return the frozen configuration of a run folder.

    Raises:
        UserError: as ``read_frozen`` and ``from_composed``.
    """
    return from_composed(read_frozen(path))


def read_frozen(path: Path) -> DictConfig:
    """Return the content of a frozen ``config.yaml``.

    Raises:
        UserError: the file can't be read, or isn't a mapping in YAML.
    """
    try:
        frozen = OmegaConf.load(path)
    except (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: can't be read ({' '.join(str(error).split())})") from None
    if not isinstance(frozen, DictConfig):
        raise UserError(f"{path}: can't be read (it isn't a mapping of keys to values)")
    return frozen


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML, with exactly the keys of its dataclasses, for ``load_config``."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(asdict(config))))


def _escaped(tree: Any) -> Any:
    """Return ``tree`` so that OmegaConf takes every string literally: ``${`` starts no interpolation."""
    if isinstance(tree, dict):
        return {key: _escaped(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_escaped(value) for value in tree]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", tree) if isinstance(tree, str) else tree


def explain(error: Exception, tree: dict[str, Any] | None = None, schema: DictConfig | None = None) -> str:
    """Return one line for an OmegaConf error: the key, its value and the problem.

    Args:
        error: the error.
        tree: the configuration with the value.
        schema: the schema with the allowed keys.
    """
    key = getattr(error, "full_key", None) or _culprit(tree or {}, schema)
    if schema is not None and re.match(r"Key '.*' (not in|is not in struct)", str(error)):
        return _unknown_key(key, tree or {}, schema)
    first_line = str(error).splitlines()[0]
    if "missing mandatory value" in first_line.lower():
        return f"{key} has no value. Fix: choose a preset for its group or set it"
    if "'None'" in first_line or "is not Optional" in first_line:
        return f"{key}=null: needs a value"
    value = OmegaConf.select(OmegaConf.create(tree or {}), key)
    if OmegaConf.is_dict(value) and value:
        return f"unknown key {key}.{next(iter(value))}: {key} is a value without keys of its own"
    return f"{key}: {first_line}" if value is None else f"{key}={value}: {first_line}"


def _culprit(tree: dict[str, Any], schema: DictConfig | None) -> str:
    """Return the first key whose value alone can't be merged, because OmegaConf names none for some values."""
    for key, value in tree.items() if schema is not None else ():
        parts = {key: {key: value}}
        if isinstance(value, dict) and is_dataclass(getattr(Config(), key, None)):
            parts = {f"{key}.{inner}": {key: {inner: one}} for inner, one in value.items()}
        for path, part in parts.items():
            try:
                OmegaConf.merge(schema, part)
            except REFUSED:
                return path
    return "?"


def _unknown_key(key: str, tree: dict[str, Any], schema: DictConfig) -> str:
    """Return the message for ``key``, with the key that was meant or the allowed keys of the known part of its path."""
    node: Any = schema
    path: list[str] = []
    for part in key.split("."):
        if part not in node:
            break
        node = node._get_node(part)
        path.append(part)
    value = OmegaConf.select(OmegaConf.create(tree), key)
    while not path and OmegaConf.is_dict(value) and value:
        last, value = next(iter(value.items()))
        key = part = f"{key}.{last}"
    allowed = choices("", map(str, node))
    near = (nearest(part, map(str, node)) if path else None) or nearest(key, _dotted(schema))
    if near and not path:
        return f"unknown key {key}; did you mean {near}={value}? {allowed}"
    known = f"{allowed}; did you mean {near}?" if near else allowed
    if len(path) == 1 and path[0] in CHOICES:
        return f"{key}={value}: {tree[path[0]]['name']} has no such option; {known}"
    return f"unknown key {key}{' in ' + '.'.join(path) if path else ''}; {known}"


def _dotted(schema: DictConfig, prefix: str = "") -> list[str]:
    """Return the dotted names of all keys, a mapping before its keys."""
    found = []
    for key in map(str, schema):
        node = schema._get_node(key)
        found.append(prefix + key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            found += _dotted(node, f"{prefix}{key}.")
    return found
