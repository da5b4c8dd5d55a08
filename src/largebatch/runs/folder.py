"""A run's folder: what is where, what state the run is in, and who works on it.

Everything is written to a temporary file and renamed, so a reader never sees half a file.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from largebatch.errors import UserError

STATES = ("queued", "running", "preempted", "finished", "diverged", "failed")
DONE = ("finished", "diverged")  # outcomes: not repeated unless asked for
RESUMES = "the same command resumes the run from its last checkpoint"


class RunBusyError(Exception):
    """Another process works on the run."""


def write_atomic(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


class RunFolder:
    """Paths and status of one run folder. Cheap: opens nothing until asked."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.status = self.path / "status.json"
        self.metrics = self.path / "metrics.jsonl"
        self.metrics_table = self.path / "metrics.parquet"
        self.layers = self.path / "layers.parquet"
        self.summary = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.best_checkpoint = self.checkpoints / "best.pt"
        self.images = self.path / "images.png"
        self.profile = self.path / "profile"
        self.log = self.path / "log.txt"

    @property
    def name(self) -> str:
        return self.path.name

    def read_status(self) -> dict[str, Any]:
        """The status, or ``{}`` where there is none yet."""
        return read_json(self.status)

    def read_summary(self) -> dict[str, Any]:
        return read_json(self.summary)

    def update_status(self, **changes: Any) -> None:
        """Merge ``changes`` into the status and stamp the time."""
        status = {**self.read_status(), **changes, "updated": time.time()}
        write_atomic(self.status, json.dumps(status, indent=1) + "\n")

    def state(self) -> str | None:
        """One of ``STATES``, or None where no run was ever planned. ``running`` may be stale: see ``is_held``."""
        return self.read_status().get("state")

    @contextmanager
    def hold(self, patience: float = 0.0) -> Iterator[None]:
        """Work on this run alone, on this host and on others that share the file system.

        ``patience``: seconds to try for; who asks ``is_held`` has the lock for a moment.

        The lock is the operating system's (POSIX record lock), so it is gone with its process, however that ended, and
        isn't inherited by children.

        Raises:
            RunBusyError: when another process holds it; the message names its pid and host.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as handle:
            until = time.monotonic() + patience
            while not _lock(handle):
                if time.monotonic() > until:
                    raise RunBusyError(self.held_by())
                time.sleep(0.05)
            yield

    def is_held(self) -> bool:
        """Whether some other process works on this run now. Never call it in the process that holds the lock: closing
        any handle of the file would release the lock."""
        lock = self.path / "lock"
        if not lock.exists():
            return False
        with lock.open("r+") as handle:
            return not _lock(handle)

    def held_by(self) -> str:
        status = self.read_status()
        where = f"pid {status['pid']} on {status['host']}" if "pid" in status else "another process"
        return f"{self.path} is being worked on by {where}; stop that one first, or wait for it"


def _lock(handle: IO[str]) -> bool:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the two ways in which systems say that it is taken
        return False
    return True


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, or ``{}`` where there is no file.

    Raises:
        UserError: when it holds something else; the project's own files are never half written.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: isn't JSON ({error}); mend or remove it") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object; mend or remove it")
    return value


def read_tail(path: Path, most: int) -> list[str]:
    """The complete lines in the last ``most`` bytes of a file, without reading the others; none where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            start = max(file.tell() - most, 0)
            file.seek(start)
            lines = file.read().split(b"\n")[:-1]  # what follows the last newline is an unfinished line
    except FileNotFoundError:
        return []
    return [line.decode(errors="replace") for line in lines[1 if start else 0 :]]


def this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname()}
