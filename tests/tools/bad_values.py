"""Values of every kind for every configuration key, and composed configurations with them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

from conftest import ROOT, TINY, configuration
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from largebatch.config.options import Limits
from largebatch.config.schema import CHOICES, LIBRARIES, Config

MANY = int(os.environ.get("FAULTS_EXAMPLES", "1"))
SEED = os.environ.get("FAULTS_SEED")
Configured = tuple[tuple[str, ...], dict[str, Any]]  # overrides, and changes by dotted key
GROUPS = (*CHOICES, "cluster", "tracker")
PRESETS: dict[str, list[str]] = {
    group: sorted(f"{group}={path.stem}" for path in (ROOT / "conf" / group).glob("*.yaml")) for group in GROUPS
}


def examples(number: int) -> settings:
    """Return the settings of a test with ``number`` examples, the same in each run unless there is a ``FAULTS_SEED``.

    ``FAULTS_EXAMPLES`` multiplies the number.
    """
    return settings(
        max_examples=number * MANY,
        deadline=None,
        derandomize=SEED is None,
        database=None,
        phases=[Phase.generate],  # shrinking takes minutes
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


def keys_of(kind: Any, prefix: str) -> dict[str, dataclasses.Field[Any]]:
    """Return the fields of a dataclass, at any depth, by dotted key."""
    found = {}
    for field in dataclasses.fields(kind):
        value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        nested = dataclasses.is_dataclass(value)
        found |= keys_of(type(value), f"{prefix}{field.name}.") if nested else {f"{prefix}{field.name}": field}
    return found


FIELDS: dict[str, dict[str, dataclasses.Field[Any]]] = {  # by key, and by the name or library of the choice ("": none)
    key: {"": field} for key, field in keys_of(Config, "").items()
}
for _group, _kinds in CHOICES.items():
    for _name, _kind in {**_kinds, **LIBRARIES[_group]}.items():
        for _key, _field in keys_of(_kind, f"{_group}.").items():
            FIELDS.setdefault(_key, {})[_name] = _field
KEYS = sorted(
    {*FIELDS, "dataset", "model", "optimizer", "dataset.views", "unknown", "model.options.x", "cluster.options.x"}
)

NUMBERS = st.one_of(
    st.integers(),
    st.integers(-2, 40),
    st.floats(),
    st.floats(0, 2),
    st.sampled_from([0, -1, 10**6, 10**12, 2**31, 2**63, 2**64, 10**30, 10**400, 1e-320, 1e-30, 1e30, 1e308]),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), -0.0]),
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "", " ", "auto", "null", "none", "nan", "inf", "${", "${seed}", "${oc.env:HOME}", "${oc.env:NOTHING}",
            "${unknown}", "${now:%Y}", "\\${seed}", "???", "a\nb", "\x00", "\x1b[0m", "\x7f", "ü" * 300, "x" * 5000,
            "\u202e", "/dev/null", "/dev/null/x", "../..", "1e3", "true", "\ud800", "'", '"', "a,b", "{a: 1}", "[1]",
            "%s", "{}", "-", "--", "=",
        ]
    ),
)  # fmt: skip
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.one_of(
    PLAIN,
    st.lists(PLAIN, max_size=4),
    st.dictionaries(st.one_of(TEXTS, st.sampled_from(KEYS), st.integers()), PLAIN, max_size=3),
    st.lists(st.lists(PLAIN, max_size=2), max_size=2),
)

# Keys with a cost. Larger values are allowed and only take memory or time, unless they are absurd.
SIZES = (
    "batch_size", "dataset.train_size", "dataset.test_size", "dataset.num_classes", "dataset.image_size",
    "dataset.workers", "dataset.crop_padding", "mode.projector", "mode.eval_epochs", "mode.eval_batch_size",
)  # fmt: skip
# Keys that the test of a worker sets itself, and one whose measurements take longer than its time limit.
FIXED = (
    "epochs", "steps", "dataset.root", "dataset.download", "runs_dir", "cluster.device", "cluster.devices",
    "instruments.sharpness_every",
)  # fmt: skip


def likely(key: str, name: str) -> st.SearchStrategy[Any]:
    """Return values of the key's kind, mostly allowed, with the edges of its limits. ``name`` is its group's choice."""
    field = FIELDS[key].get(name) or FIELDS[key][""]
    limits: Limits = field.metadata.get("limits", Limits())
    kinds = str(field.type)
    found: list[Any] = [None] if "None" in kinds else []
    if limits.allowed:
        return st.sampled_from([*found, *limits.allowed])
    found += limits.words
    if "bool" in kinds:
        found += [False, True]
    edges = [edge for edge in (limits.least, limits.most, limits.above, limits.below) if edge is not None]
    if "int" in kinds or "float" in kinds:
        found += [*map(int, edges), 1, 2, 3, 4, 7, 16]
        found += [] if key in SIZES else [31, 1000, 2**31, 2**62, 2**63 - 1]
        found += [10**13, 2**62] if key in ("dataset.train_size", "mode.projector", "dataset.num_classes") else []
    if "float" in kinds:
        found += [*map(float, edges), 0.01, 0.3, 0.5, 0.999, 1e-320, 1e-45, 1e-8, 1e4, 1e38, 1e300, 1.7e308]
    plain = st.sampled_from(found) if found else st.nothing()
    if "str" in kinds:
        plain = plain | TEXTS
    if "list" in kinds:
        return st.lists(plain, min_size=1, max_size=3) | (st.none() if "None" in kinds else st.nothing())
    if "dict" in kinds:
        return st.dictionaries(st.sampled_from(["x", "lr", "drop_rate", "eps", "img_size"]) | TEXTS, PLAIN, max_size=2)
    return plain


@functools.cache
def _composed(*overrides: str) -> dict[str, Any]:
    return dataclasses.asdict(configuration(*overrides))


def base(*overrides: str) -> dict[str, Any]:
    """Return the configuration of ``overrides`` as a tree. Each preset is composed once, without the other presets."""
    presets = [one for one in overrides if one.partition("=")[0] in GROUPS]
    tree = dict(_composed(*overrides[: len(tiny(presets[0]))]))
    for preset in presets[1:]:
        group = preset.partition("=")[0]
        tree[group] = _composed(preset)[group]
    return tree


def tiny(dataset: str) -> tuple[str, ...]:
    """Return overrides for a tiny run on the data set of a preset."""
    if dataset == "dataset=synthetic":
        return TINY
    return (dataset, *(one for one in TINY if not one.startswith("dataset")))


def with_changes(tree: dict[str, Any], changes: dict[str, Any], runs_dir: Path) -> dict[str, Any]:
    """Return a copy of ``tree`` with ``changes``, by dotted key."""
    tree = copy.deepcopy(tree) | {"runs_dir": str(runs_dir)}
    for key, value in changes.items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                break
        else:
            node[last] = value
    return tree


@st.composite
def configurations(draw: st.DrawFn, worker: bool) -> Configured:
    """Return overrides of a preset for each group, and changes of one to three keys by dotted key.

    With ``worker``, most changes are allowed values, and none needs GPUs, SLURM, a network or a long time.
    """
    groups = [group for group in GROUPS if group != "dataset" and not (worker and group in ("cluster", "model"))]
    chosen = [draw(st.sampled_from(PRESETS[group])) for group in groups if draw(st.integers(0, 2)) == 0]
    chosen = [preset for preset in chosen if not (worker and preset.startswith("tracker") and draw(st.integers(0, 5)))]
    model, datasets = "model=smallcnn", PRESETS["dataset"]
    if draw(st.integers(0, 5)) == 0:
        model = draw(st.sampled_from(["model=resnet18", "model=timm"] if worker else PRESETS["model"]))
    if worker:
        datasets = ["dataset=synthetic", "dataset=digits", "dataset=imagefolder"]
    dataset = draw(st.sampled_from(datasets))
    overrides = (*tiny(dataset), model, *chosen)
    tree = base(*overrides)
    keys = [key for key in FIELDS if _has(tree, key) and not (worker and key in FIXED)]
    if not worker:
        return overrides, draw(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
    changes = {}
    for key in draw(st.lists(st.sampled_from(sorted(keys)), min_size=1, max_size=4, unique=True)):
        group = key.partition(".")[0]
        choice = tree[group] if isinstance(tree[group], dict) else {}
        name = choice.get("library") or choice.get("name", "")
        odd = draw(st.integers(0, 9)) == 0 and key not in SIZES
        changes[key] = draw(VALUES if odd else likely(key, name if group in CHOICES else ""))
    return overrides, changes


def _has(tree: dict[str, Any], key: str) -> bool:
    node: Any = tree
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True
