"""Any value of any key gives a plan or one message, and a worker of one step a result or one message.

The examples are the same in each run. ``FAULTS_EXAMPLES`` multiplies their number.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY, configuration
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from largebatch.config.identity import run_name
from largebatch.config.schema import CHOICES, Config, load_config, to_yaml
from largebatch.errors import UserError
from largebatch.launch.composition import Composed
from largebatch.launch.grid import show_plan
from largebatch.launch.plan import make_plan

MANY = int(os.environ.get("FAULTS_EXAMPLES", "1"))
HOW: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "phases": [Phase.generate],  # shrinking takes minutes
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
PRESETS: dict[str, list[str]] = {
    group: sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml")) for group in (*CHOICES, "cluster")
}


def keys_of(kind: Any, prefix: str) -> list[str]:
    found = []
    for field in dataclasses.fields(kind):
        value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        nested = dataclasses.is_dataclass(value)
        found += keys_of(type(value), f"{prefix}{field.name}.") if nested else [f"{prefix}{field.name}"]
    return found


KEYS = sorted(
    set(keys_of(Config, ""))
    | {key for group, kinds in CHOICES.items() for kind in kinds.values() for key in keys_of(kind, f"{group}.")}
    | {"dataset", "model", "optimizer", "dataset.views", "unknown", "model.options.x", "cluster.options.x"}
)
NUMBERS = st.one_of(
    st.integers(),
    st.integers(-2, 40),
    st.floats(),
    st.floats(0, 2),
    st.sampled_from([0, -1, 10**6, 10**12, 2**63, 10**30, 1e-30, 1e30, 1e308]),
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "",
            " ",
            "auto",
            "null",
            "none",
            "${",
            "${seed}",
            "${oc.env:HOME}",
            "\\${seed}",
            "???",
            "a\nb",
            "\x00",
            "\x1b[0m",
            "ü" * 300,
            "/dev/null",
            "/dev/null/x",
            "../..",
            "1e3",
            "true",
            "\ud800",
            "'",
            '"',
            "a,b",
        ]
    ),
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.one_of(
    PLAIN,
    st.lists(PLAIN, max_size=4),
    st.dictionaries(st.one_of(TEXTS, st.sampled_from(KEYS), st.integers()), PLAIN, max_size=3),
    st.lists(st.lists(PLAIN, max_size=2), max_size=2),
)


@functools.cache
def base(preset: str) -> dict[str, Any]:
    return dataclasses.asdict(configuration(*TINY, preset))


def tree_with(preset: str, changes: dict[str, Any], runs_dir: Path) -> dict[str, Any]:
    """Return a composed tree of one preset with ``changes``, by dotted key."""
    tree = copy.deepcopy(base(preset))
    tree["runs_dir"] = str(runs_dir)
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


@settings(max_examples=150 * MANY, **HOW)
@given(
    preset=st.sampled_from([f"{group}={name}" for group in PRESETS if group != "dataset" for name in PRESETS[group]]),
    changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3),
)
def test_any_value_gives_a_plan_or_a_message(tmp_path, preset, changes) -> None:
    tree = tree_with(preset, changes, tmp_path / "runs")
    try:
        (run,) = make_plan([Composed((), tree, None, multirun=False)])
        show_plan([run])
    except UserError as error:
        message = str(error)
    else:
        message = ""
    assert not message.startswith("?:"), "a message without the key"
    if message:
        return
    assert not (tmp_path / "runs").exists()
    frozen = tmp_path / "config.yaml"
    frozen.write_text(to_yaml(run.config), encoding="utf-8")
    read = load_config(frozen)
    assert to_yaml(read) == to_yaml(run.config), "the worker reads another configuration than the launcher wrote"
    assert run_name(read) == run_name(run.config)


SMALL = st.one_of(
    st.none(), st.booleans(), st.integers(-1, 20), st.floats(0, 2, width=16), st.sampled_from(["auto", ""])
)
TRAINED = [
    key
    for key in KEYS
    if key.startswith(("dataset.", "model.", "optimizer.", "schedule.", "mode.", "lr_scaling."))
    or key in ("batch_size", "micro_batch", "batch_norm_size", "precision", "sync_bn", "eval_every", "seed")
    if key
    not in ("dataset.root", "dataset.download", "mode.name", "dataset.name", "model.options", "optimizer.options")
]


@pytest.mark.timeout(600)
@settings(max_examples=20 * MANY, **HOW)
@given(
    preset=st.sampled_from(
        [f"{group}={name}" for group in ("optimizer", "schedule", "mode") for name in PRESETS[group]]
    ),
    changes=st.dictionaries(
        st.sampled_from(TRAINED), st.one_of(SMALL, st.lists(st.floats(0, 1, width=16), max_size=3)), max_size=3
    ),
)
def test_a_plan_trains_one_step_or_ends_with_a_message(preset, changes) -> None:
    import torch

    from largebatch.runs.folder import RunFolder
    from largebatch.tracking.console import Console
    from largebatch.training.worker import train

    work = Path(tempfile.mkdtemp(prefix="largebatch-"))
    try:
        tree = tree_with(preset, {"compile": False, "precision": "fp32"} | changes, work / "runs")
        tree |= {"epochs": None, "steps": 1}
        tree["dataset"]["workers"] = 0
        try:
            (run,) = make_plan([Composed((), tree, None, multirun=False)])
        except UserError:
            return
        folder = RunFolder(work / "runs" / "one")
        folder.path.mkdir(parents=True)
        folder.update_status(state="running", message="")
        folder.config.write_text(to_yaml(run.config), encoding="utf-8")
        try:
            with Console(folder.log, False) as console:
                train(load_config(folder.config), folder, 0, 1, torch.device("cpu"), console)
        except UserError:
            return
        assert folder.state() in ("finished", "diverged")
    finally:
        shutil.rmtree(work)
