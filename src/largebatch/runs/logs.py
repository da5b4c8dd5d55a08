"""``largebatch logs``: a run's log, and its new lines."""

from __future__ import annotations

import time
from pathlib import Path

from largebatch.errors import UserError
from largebatch.runs.folder import RunFolder
from largebatch.runs.table import run_rows

_POLL_SECONDS = 0.5
_STATE_SECONDS = 5.0  # between looks at the run's state, which may ask SLURM


def show_log(folder: RunFolder, lines: int | None, follow: bool) -> None:
    """Print a run's log, or SLURM's logs of its job if the run's own log is empty.

    Args:
        lines: print only the last ``lines``.
        follow: print new lines until the run is neither queued nor running.

    Raises:
        UserError: there is no log yet, and ``follow`` is False.
    """
    logs = _logs(folder)
    if not logs and not follow:
        raise UserError(f"{folder.path}: no log yet; the run is {folder.state()}")
    for log in logs:
        if log != folder.log:
            print(f"==> {log}")
        text = log.read_text(errors="replace").splitlines()
        print("\n".join(text[-lines:] if lines is not None else text), flush=True)
    if follow:
        _follow(folder, folder.log.stat().st_size if folder.log in logs else 0)


def _logs(folder: RunFolder) -> list[Path]:
    """Return the run's own log, or else SLURM's logs, which hold failures from before the run started."""
    of_job = sorted(folder.slurm.glob(f"{folder.read_status().get('job_id')}_*_log.*"))
    with_text = [path for path in (folder.log, *of_job) if path.exists() and path.stat().st_size > 0]
    return [folder.log] if folder.log in with_text else with_text


def _follow(folder: RunFolder, position: int) -> None:
    looked, is_open = 0.0, True
    while is_open:
        if time.monotonic() - looked >= _STATE_SECONDS:
            looked = time.monotonic()
            is_open = run_rows([folder])[0]["state"] in ("queued", "running")
        if folder.log.exists():
            with folder.log.open("rb") as log:
                log.seek(position)
                new = log.read()
            position += len(new)
            print(new.decode(errors="replace"), end="", flush=True)
        if is_open:
            time.sleep(_POLL_SECONDS)
