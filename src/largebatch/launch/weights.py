"""The file of ``model.weights``: its place and the hash of its content, which is part of a run's identity."""

from __future__ import annotations

import functools
from pathlib import Path

from largebatch.config.schema import Config
from largebatch.config.typed import read_frozen
from largebatch.errors import UserError
from largebatch.runs.folder import RunFolder
from largebatch.runs.provenance import content_hash
from largebatch.runs.table import find_run, list_runs


def resolve_weights(config: Config) -> None:
    """Set ``model.weights`` to the absolute path of its file, and ``model.weights_hash`` to the hash of its content.

    If the source is gone, both come from the runs in ``runs_dir`` that started from it, so that the same command
    still finds and resumes them.

    Raises:
        UserError: there is no such file or finished run, or the file isn't the one with the given hash.
    """
    model = config.model
    if model.weights is None:
        return
    given, runs_dir = model.weights, Path(config.runs_dir)
    try:
        path = _file(given, runs_dir)
    except (UserError, OSError) as error:
        known = {(model.weights, model.weights_hash)} if model.weights_hash else _remembered(given, runs_dir)
        if len(known) != 1:
            raise UserError(f"model.weights={error}") from None
        ((model.weights, model.weights_hash),) = known
        return
    found = _hash(path, path.stat().st_mtime_ns)
    if model.weights_hash not in (None, found):
        raise UserError(
            f"model.weights={given}: its content has changed: its hash is {found}, not model.weights_hash="
            f"{model.weights_hash}. Fix: restore the file"
        )
    model.weights, model.weights_hash = str(path), found


def _file(given: str, runs_dir: Path) -> Path:
    """Return the file that ``given`` names: itself, or the last checkpoint of a finished run.

    Raises:
        UserError: there is none.
    """
    path = Path(given).expanduser().absolute()
    if path.is_file():
        return path
    if not path.is_dir() and path.suffix in (".pt", ".pth", ".safetensors"):
        raise UserError(f"{given}: no such file")
    run = find_run(str(path) if path.is_dir() else given, runs_dir)
    if run.state() != "finished":
        raise UserError(f"{given}: the run hasn't finished; it is {run.state()}. Fix: finish it, or name a checkpoint")
    newest = max(run.checkpoints.glob("step-*.pt"), default=None)
    if newest is None:
        raise UserError(f"{given}: the run has no checkpoint. Fix: run its command with rerun=true")
    return newest.absolute()


@functools.cache
def _hash(path: Path, changed: int) -> str:
    return content_hash(path)


def _remembered(given: str, runs_dir: Path) -> set[tuple[str | None, str | None]]:
    """Return path and hash of the weights that ``given`` named, of the runs that started from them."""
    found: set[tuple[str | None, str | None]] = set()
    for folder in list_runs(runs_dir):
        model = _frozen_model(folder)
        weights, digest = model.get("weights"), model.get("weights_hash")
        if not isinstance(weights, str) or not isinstance(digest, str):
            continue
        source = Path(weights).parent.parent  # of a checkpoint: the run
        named = source.name.startswith(given) or source.name.rpartition("-")[2].startswith(given)
        if Path(given).expanduser().absolute() in (Path(weights), source) or named:
            found.add((weights, digest))
    return found


def _frozen_model(folder: RunFolder) -> dict[str, object]:
    try:
        return dict(read_frozen(folder.config).get("model") or {})
    except (UserError, ValueError, TypeError):  # `largebatch status` names such folders
        return {}
