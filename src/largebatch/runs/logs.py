"""What a run has said, and what it says on."""

from __future__ import annotations

import time
from pathlib import Path

from largebatch.errors import UserError
from largebatch.runs.folder import RunFolder
from largebatch.runs.table import run_rows

_POLL_SECONDS = 0.5
_STATE_SECONDS = 5.0  # between looks at the run's state, for which SLURM may have to be asked


def show_log(folder: RunFolder, lines: int | None, *, follow: bool) -> None:
    """Print a run's log, or what SLURM wrote of its job where the run itself has said nothing.

    Args:
        lines: only so many from its end.
        follow: go on printing until the run is neither queued nor running.

    Raises:
        UserError: when there is nothing to print, and nothing to wait for.
    """
    logs = _logs(folder)
    if not logs and not follow:
        raise UserError(f"{folder.path}: nothing is logged yet; its state: {folder.state()}")
    for log in logs:
        if log != folder.log:
            print(f"==> {log}")
        text = log.read_text(errors="replace").splitlines()
        print("\n".join(text[-lines:] if lines is not None else text), flush=True)
    if follow:
        _follow(folder, folder.log.stat().st_size if folder.log in logs else 0)


def _logs(folder: RunFolder) -> list[Path]:
    """The run's own log; else SLURM's of its job, which have what went wrong before the run could say it."""
    candidates = [folder.log]
    if not _has_text(folder.log) and (job := folder.read_status().get("job_id")):
        candidates = sorted((folder.path.parent / ".slurm").glob(f"{job}_*_log.*"))
    return [path for path in candidates if _has_text(path)]


def _has_text(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _follow(folder: RunFolder, position: int) -> None:
    looked, goes_on = 0.0, True
    while goes_on:
        if time.monotonic() - looked >= _STATE_SECONDS:
            looked = time.monotonic()
            (row,) = run_rows([folder])
            goes_on = row["state"] in ("queued", "running")
        if folder.log.exists():
            with folder.log.open("rb") as log:
                log.seek(position)
                said = log.read()
            position += len(said)
            print(said.decode(errors="replace"), end="", flush=True)
        if goes_on:
            time.sleep(_POLL_SECONDS)
