"""Run folders as the report reads them: what is whole becomes a ``Run``, what isn't is named and left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from largebatch.config.identity import decisive
from largebatch.runs.folder import DONE, STATES, RunFolder
from largebatch.runs.metrics import Row, read_rows

Tree = dict[str, Any]
Read = TypeVar("Read")

# What a configuration must say for its run to have a place in a comparison.
_NEEDED: dict[str, type | tuple[type, ...]] = {
    "dataset.name": str, "model.name": str, "mode.name": str, "optimizer.name": str, "schedule.name": str,
    "optimizer.lr": (int, float), "batch_size": int, "seed": int,
}  # fmt: skip


class _Broken(Exception):
    """A file of a run folder that can't be used; the message says which and why."""


@dataclass(frozen=True)
class Problem:
    """Something below the folder of runs that the report leaves out."""

    where: str  # the folder's name, or folder and file
    what: str


@dataclass(frozen=True)
class Run:
    """A run that a comparison can place.

    Attributes:
        state: of ``run_folder.STATES``, or ``interrupted``: its process is gone without having said how it ended.
        summary: figures and facts of ``summary.json``; of a run without an outcome it may be empty.
    """

    folder: RunFolder
    config: Tree
    state: str
    message: str
    summary: Tree

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def done(self) -> bool:
        return self.state in DONE

    @cached_property
    def options(self) -> Tree:
        """All that can change the result, by dotted key; keys that are None are left out."""
        return flat(decisive(self.config))

    @cached_property
    def given(self) -> Tree:
        """The whole configuration by dotted key; keys that are None are left out."""
        return flat(self.config)

    def figure(self, name: str) -> float | None:
        """A number of the summary, None where it isn't one."""
        return number(self.summary.get(name))


def number(value: object) -> float | None:
    """``value`` if it is a finite number: nothing that was measured in single precision is beyond 1e100."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100:
        return float(value)
    return None


def flat(tree: Tree, prefix: str = "") -> Tree:
    """``{"optimizer": {"lr": 2.0}}`` as ``{"optimizer.lr": 2.0}``; lists become text, None and empty are left out."""
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
    """The runs below ``runs_dir`` by name, and what is there beside them that can't be read as one.

    Hidden entries and plain files are passed over, and so are the ``previous-N`` folders inside of a run: what a
    repetition set aside.
    """
    runs, problems = [], []
    for path in sorted(path for path in runs_dir.iterdir() if path.is_dir() and not path.name.startswith(".")):
        try:
            runs.append(_load(RunFolder(path)))
        except _Broken as error:
            problems.append(Problem(path.name, str(error)))
    return _without_copies(runs, problems), problems


def _load(folder: RunFolder) -> Run:
    if not any(path.exists() for path in (folder.config, folder.status, folder.metrics)):
        raise _Broken("not a run folder: it has no config.yaml, status.json or metrics.jsonl")
    config = _attempt(folder.config, _read_config)
    for key, kind in _NEEDED.items():
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise _Broken(f"config.yaml says no usable {key} ({value!r}); is it of another version?")
    if config["batch_size"] < 1 or number(config["optimizer"]["lr"]) is None:
        raise _Broken("config.yaml says a batch size or a learning rate that can't be")
    if not isinstance(config.get("lr_scaling", {}), dict):
        raise _Broken("config.yaml's lr_scaling is not a mapping")
    status = _attempt(folder.status, _read_object)
    state = status.get("state")
    if state not in STATES:
        raise _Broken(f"status.json has no state that is known ({state!r})")
    summary: Tree = {}
    if state in DONE:
        summary = _attempt(folder.summary, _read_object)
    if state == "running" and not _is_at_work(folder):
        state = "interrupted"
    run = Run(folder, config, str(state), str(status.get("message") or ""), summary)
    if state == "finished" and run.figure("test/accuracy") is None:
        raise _Broken("summary.json has no test/accuracy, although the run finished")
    return run


def _is_at_work(folder: RunFolder) -> bool:
    try:
        return folder.is_held()
    except OSError:  # a copy that may only be read can't be asked: it is as its status says
        return True


def _without_copies(runs: list[Run], problems: list[Problem]) -> list[Run]:
    """Each configuration once: a folder copied under another name would pass for another seed's run."""
    known: dict[str, str] = {}
    kept = []
    for run in runs:
        key = json.dumps(run.options, sort_keys=True, default=str)
        if key in known:
            problems.append(Problem(run.name, f"the same configuration and seed as {known[key]}; only that one counts"))
        else:
            known[key] = run.name
            kept.append(run)
    return kept


def read_history(run: Run, problems: list[Problem]) -> list[Row]:
    """The rows of ``metrics.jsonl`` that have a step; none, and a problem noted, where the file can't be read."""
    try:
        rows = _attempt(run.folder.metrics, read_rows)
    except _Broken as error:
        problems.append(Problem(run.name, f"{error}; its curves are left out"))
        return []
    return [row for row in rows if isinstance(row, dict) and number(row.get("step")) is not None]


@dataclass(frozen=True)
class Layers:
    """Norms and trust ratios of a run's layers.

    Attributes:
        steps: optimizer steps, ascending.
        names: layers in the model's order.
        figures: for each column of ``layers.parquet`` a list over layers of lists over steps.
    """

    steps: list[int]
    names: list[str]
    figures: dict[str, list[list[float | None]]]


def read_layers(run: Run, most_steps: int, problems: list[Problem]) -> Layers | None:
    """``layers.parquet`` at up to ``most_steps`` steps, evenly spaced; None where there is none that can be read."""
    if not run.folder.layers.exists():
        return None
    try:
        return _attempt(run.folder.layers, lambda path: _layers(path, most_steps))
    except _Broken as error:
        problems.append(Problem(run.name, f"{error}; its layers are left out"))
        return None


def _layers(path: Path, most_steps: int) -> Layers | None:
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    columns = ("weight_norm", "gradient_norm", "trust_ratio")
    table = pyarrow.parquet.read_table(path, columns=["step", "layer", *columns])
    steps = thinned(sorted(pyarrow.compute.unique(table["step"]).to_pylist()), most_steps)
    table = table.filter(pyarrow.compute.is_in(table["step"], pyarrow.array(steps)))
    if not steps or not table.num_rows:
        return None
    names = list(dict.fromkeys(table["layer"].to_pylist()))
    column_of = {step: i for i, step in enumerate(steps)}
    row_of = {name: i for i, name in enumerate(names)}
    figures: dict[str, list[list[float | None]]] = {c: [[None] * len(steps) for _ in names] for c in columns}
    places = [
        (row_of[n], column_of[s]) for n, s in zip(*(table[c].to_pylist() for c in ("layer", "step")), strict=True)
    ]
    for column in columns:
        for (row, at), value in zip(places, table[column].to_pylist(), strict=True):
            figures[column][row][at] = number(value)
    return Layers(steps, names, figures)


Item = TypeVar("Item")


def thinned(items: list[Item], most: int) -> list[Item]:
    """At most ``most`` items (two or more), evenly spaced, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _attempt(path: Path, read: Callable[[Path], Read]) -> Read:
    """What ``read`` makes of a file.

    Raises:
        _Broken: whatever was wrong with the file; its content is anybody's, and one bad file stops no report.
    """
    import pyarrow
    import yaml

    try:
        return read(path)
    except _Broken:
        raise
    except FileNotFoundError:
        raise _Broken(f"{path.name} is missing") from None
    except (ValueError, KeyError, TypeError, OSError, yaml.YAMLError, pyarrow.ArrowException) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _Broken(f"{path.name} can't be read ({reason})") from None


def _read_config(path: Path) -> Tree:
    # Frozen and resolved, so plain YAML is enough: OmegaConf and the schema would take thirty times as long.
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with path.open(encoding="utf-8") as file:
        tree = yaml.load(file, Loader=loader)
    if not isinstance(tree, dict):
        raise _Broken("config.yaml is not a mapping of keys to values")
    return tree


def _read_object(path: Path) -> Tree:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise _Broken(f"{path.name} is not an object")
    return value
