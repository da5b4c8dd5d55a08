"""Read run folders for the report. A complete folder becomes a ``Run``, any other a ``Problem``."""

from __future__ import annotations

import dataclasses
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow.compute
import pyarrow.parquet
import yaml

from largebatch.config.datasets import dataset_kind
from largebatch.config.identity import decisive
from largebatch.config.modes import MODES
from largebatch.errors import UserError
from largebatch.runs.correct import Bits, read_correct
from largebatch.runs.folder import DONE, STATES, RunFolder
from largebatch.runs.metrics import Row, read_lines
from largebatch.runs.predictions import Predictions, read_predictions
from largebatch.tracking.rows import COLUMNS

Tree = dict[str, Any]
Item = TypeVar("Item")

# Keys that a configuration needs to have a place in a comparison.
_NEEDED: dict[str, type | tuple[type, ...]] = {
    "dataset.name": str, "model.name": str, "mode.name": str, "optimizer.name": str, "schedule.name": str,
    "lr_scaling.rule": str, "optimizer.lr": (int, float), "batch_size": int, "seed": int,
}  # fmt: skip


class _Broken(Exception):
    """A file of a run folder can't be used. The message names the file and the reason."""


class Problem(NamedTuple):
    """A folder, or a file of a run, that the report leaves out."""

    where: str  # name of the folder
    what: str


@dataclass(frozen=True)
class Run:
    """A run that has a place in a comparison.

    Attributes:
        state: one of ``runs.folder.STATES``, or ``interrupted``: the process ended without writing a state.
        summary: content of ``summary.json``. Empty for a run that neither finished nor diverged.
        correct: correct test images, bool [number of images], of the ``last`` and the ``best`` evaluation.
        data: digest of the data set. Empty before the run's first start.
    """

    folder: RunFolder
    config: Tree
    state: str
    message: str
    summary: Tree
    correct: Mapping[str, Bits] = field(default_factory=dict)
    data: str = ""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def done(self) -> bool:
        return self.state in DONE

    @property
    def confirms(self) -> bool:
        """True for a run of ``largebatch confirm``."""
        return bool(self.config.get("confirms"))

    @cached_property
    def options(self) -> Tree:
        """Configuration that can change the result, by dotted key, without None."""
        return flat(decisive(self.config))

    @cached_property
    def given(self) -> Tree:
        """Whole configuration by dotted key, without None."""
        return flat(self.config)

    def metric(self, name: str) -> float | None:
        """Return a number from the summary, or None if the summary has no such number."""
        return number(self.summary.get(name))

    def correct_images(self, metric: str) -> Bits | None:
        """Return the test images of which ``metric`` is the accuracy, or None if they aren't known."""
        bits, accuracy = self.correct.get("best" if metric.startswith("best/") else "last"), self.metric(metric)
        return bits if bits is not None and accuracy is not None and abs(bits.mean() - accuracy) < 1e-9 else None


def number(value: Any) -> float | None:
    """Return ``value`` as a float, or None if it isn't a finite number. No single-precision metric exceeds 1e100."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100:
        return float(value)
    return None


def flat(tree: Tree, prefix: str = "") -> Tree:
    """Flatten ``{"optimizer": {"lr": 2.0}}`` to ``{"optimizer.lr": 2.0}``. Lists become JSON text; None is dropped."""
    found: Tree = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            found[f"{prefix}{key}"] = json.dumps(value, default=str)
        elif value is not None:
            found[f"{prefix}{key}"] = value
    return found


def load_runs(runs_dir: Path) -> tuple[list[Run], list[Problem]]:
    """Return the runs in ``runs_dir`` by name, and a problem for each folder that isn't a readable run.

    Hidden folders and plain files are skipped without a problem. ``previous-N`` folders inside a run are no runs: a
    repetition moved them there.

    Raises:
        UserError: ``runs_dir`` is no folder.
    """
    if not runs_dir.is_dir():
        raise UserError(f"{runs_dir}: not a folder. Fix: give the folder that holds the runs")
    runs: dict[str, Run] = {}
    problems, copies = [], []
    for path in sorted(path for path in runs_dir.iterdir() if path.is_dir() and not path.name.startswith(".")):
        try:
            run = _load(RunFolder(path))
        except (_Broken, PermissionError) as error:  # another user's folder may show nothing
            problems.append(Problem(path.name, str(error)))
            continue
        # A copied folder would otherwise count as another seed.
        first = runs.setdefault(json.dumps([run.options, run.data], sort_keys=True, default=str), run)
        if first is not run:
            what = f"the same configuration and seed as {first.name}; only {first.name} counts"
            copies.append(Problem(run.name, what))
    for key, run in runs.items():
        if run.folder.correct.exists():
            try:
                runs[key] = dataclasses.replace(run, correct=_attempt(run.folder.correct, read_correct))
            except _Broken as error:
                problems.append(Problem(run.name, f"{error}; its test images count as unknown"))
    return list(runs.values()), problems + copies


def _load(folder: RunFolder) -> Run:
    if not any(path.exists() for path in (folder.config, folder.status, folder.metrics)):
        raise _Broken("not a run folder: it has no config.yaml, status.json or metrics.jsonl")
    config = _attempt(folder.config, _read_tree)
    for key, kind in _NEEDED.items():
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise _Broken(f"config.yaml has no valid {key} ({value!r})")
    if dataset_kind(config["dataset"]) is None or config["mode"]["name"] not in MODES:
        raise _Broken("config.yaml has an unknown data set or mode")
    if config["batch_size"] < 1 or number(config["optimizer"]["lr"]) is None:
        raise _Broken("config.yaml has an invalid batch size or learning rate")
    space = config.get("space") or {}
    if not isinstance(space, dict) or not all(
        isinstance(of, list) and len(set(map(str, of))) > 1 for of in space.values()
    ):
        raise _Broken("config.yaml has an invalid space")
    status = _attempt(folder.status, _read_tree)
    state = status.get("state")
    if state not in STATES:
        raise _Broken(f"status.json has an unknown state ({state!r})")
    summary = _attempt(folder.summary, _read_tree) if state in DONE else {}
    if state == "running" and not folder.is_held():
        state = "interrupted"
    run = Run(folder, config, str(state), str(status.get("message") or ""), summary, data=str(status.get("data") or ""))
    if state == "finished" and run.metric("test/accuracy") is None:
        raise _Broken("summary.json has no test/accuracy, although the run finished")
    return run


def read_history(run: Run, problems: list[Problem]) -> list[Row]:
    """Return the rows of ``metrics.jsonl`` that have a step. Add a problem if the file can't be read."""
    try:
        rows = _attempt(run.folder.metrics, read_lines)
    except _Broken as error:
        problems.append(Problem(run.name, f"{error}; its curves are left out"))
        return []
    return [row for row in rows if isinstance(row, dict) and number(row.get("step")) is not None]


def read_predictions_of(run: Run, problems: list[Problem]) -> Predictions | None:
    """Return ``predictions.parquet``, or None if there is none. Add a problem if the file can't be read."""
    if not run.folder.predictions.exists():
        return None
    try:
        return _attempt(run.folder.predictions, read_predictions)
    except _Broken as error:
        problems.append(Problem(run.name, f"{error}; its predictions are left out"))
        return None


class Layers(NamedTuple):
    """Norms and trust ratios of a run's layers.

    Attributes:
        steps: optimizer steps, ascending.
        names: layers in the model's order.
        dimensions: of each layer. Biases and norm scales have one.
        columns: for each column of ``layers.parquet``, values of shape [layers, steps].
    """

    steps: list[int]
    names: list[str]
    dimensions: list[int]
    columns: dict[str, list[list[float | None]]]


def read_layers(run: Run, most_steps: int, problems: list[Problem]) -> Layers | None:
    """Return ``layers.parquet`` at up to ``most_steps`` steps, dense at the start.

    None if there is no such file or no row in it. If the file can't be read, add a problem and return None.
    """
    if not run.folder.layers.exists():
        return None
    try:
        return _attempt(run.folder.layers, lambda path: _layers(path, most_steps))
    except _Broken as error:
        problems.append(Problem(run.name, f"{error}; its layers are left out"))
        return None


def _layers(path: Path, most_steps: int) -> Layers | None:
    table = pyarrow.parquet.read_table(path, columns=["step", "layer", "dimensions", *COLUMNS])
    steps = thinned(sorted(table["step"].unique().to_pylist()), most_steps, power=2)
    if not steps:
        return None
    rows = table.filter(pyarrow.compute.field("step").isin(steps)).to_pydict()
    dimensions = dict(zip(rows["layer"], rows["dimensions"], strict=True))
    names = list(dimensions)
    values: dict[str, list[list[float | None]]] = {}
    for column in COLUMNS:
        at = {(n, s): number(v) for n, s, v in zip(rows["layer"], rows["step"], rows[column], strict=True)}
        values[column] = [[at.get((name, step)) for step in steps] for name in names]
    return Layers(steps, names, list(dimensions.values()), values)


def thinned(items: list[Item], most: int, power: int = 1) -> list[Item]:
    """Return at most ``most`` (two or more) items, with the first and the last.

    Item ``i`` is at ``(i / most) ** power`` of the length. So the items are evenly spaced with 1. With 2, the first
    items are all kept, and the last are twice as far apart as evenly spaced items.
    """
    if len(items) <= most:
        return items
    return [items[max(i, round((i / (most - 1)) ** power * (len(items) - 1)))] for i in range(most)]


def _attempt(path: Path, read: Callable[[Path], Item]) -> Item:
    """Return the result of ``read``. An error in the file becomes ``_Broken``, so that it doesn't stop the report."""
    try:
        return read(path)
    except FileNotFoundError:
        raise _Broken(f"{path.name} is missing") from None
    except (
        ArithmeticError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError, UserError, ValueError,
        struct.error, zipfile.BadZipFile, zlib.error, yaml.YAMLError, pyarrow.ArrowException,
    ) as error:  # fmt: skip
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _Broken(f"{path.name} can't be read ({reason})") from None


def _read_tree(path: Path) -> Tree:
    text = path.read_text(encoding="utf-8")
    # config.yaml has no interpolations, so plain YAML is enough; OmegaConf with the schema takes 30 times as long.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    tree = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=loader)
    if not isinstance(tree, dict):
        raise _Broken(f"{path.name} is not a mapping of keys to values")
    return tree
