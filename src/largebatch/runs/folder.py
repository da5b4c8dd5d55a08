"""A run's folder: its files, the run's state, and the lock of the process that works on it.

Files are written under a temporary name and renamed, so that readers never see half a file.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from largebatch.errors import UserError

STATES = ("queued", "running", "preempted", "finished", "diverged", "failed")
DONE = ("finished", "diverged")  # outcomes: such runs are skipped
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
RESUMES = "the same command resumes the run from its last checkpoint"


class RunBusyError(Exception):
    """Another process holds the run's lock."""


def replace_file(path: Path, write: Callable[[Path], object], *, sync: bool = True) -> None:
    """Call ``write`` with a temporary name, and rename the file to ``path``.

    With ``sync``, the content is on the disk before the rename: a crash of the machine leaves the old or the new file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        if sync:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, text: str, *, sync: bool = True) -> None:
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), sync=sync)


class RunFolder:
    """Paths and status of a run. Creating the object reads no file."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.status = self.path / "status.json"
        self.metrics = self.path / "metrics.jsonl"
        self.metrics_table = self.path / "metrics.parquet"
        self.layers = self.path / "layers.parquet"
        self.correct = self.path / "correct.npz"
        self.predictions = self.path / "predictions.parquet"
        self.summary = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.best_checkpoint = self.checkpoints / "best.pt"
        self.images = self.path / "images.png"
        self.worst_images = self.path / "worst.png"
        self.profile = self.path / "profile"
        self.log = self.path / "log.txt"
        self.slurm = self.path.parent / ".slurm"  # SLURM's logs and submitit's files of all runs
        self.code = self.path.parent / ".code"  # copies of the package for queued jobs

    @property
    def name(self) -> str:
        return self.path.name

    def read_status(self) -> dict[str, Any]:
        """Return the status, or ``{}`` if there is none yet."""
        return read_json(self.status)

    def read_summary(self) -> dict[str, Any]:
        return read_json(self.summary)

    def update_status(self, **changes: Any) -> None:
        """Merge ``changes`` and the time into the status. A new state is on the disk when this returns.

        A full disk has no room for another file. Then the present file is overwritten in place, which needs no room.
        """
        status = {**self.read_status(), **changes, "updated": time.time()}
        text = json.dumps(status, indent=1) + "\n"
        try:
            write_atomic(self.status, text, sync="state" in changes)
        except OSError as error:
            if error.errno not in DISK_FULL or not self.status.exists():
                raise
            with self.status.open("r+b", buffering=0) as file:
                file.write(text.encode())
                file.truncate()

    def has_progress(self) -> bool:
        """Return True if the folder holds a checkpoint or a row of metrics."""
        has_row = self.metrics.exists() and self.metrics.stat().st_size > 0
        return has_row or any(self.checkpoints.glob("*.pt"))

    def remove_leftovers(self) -> None:
        """Remove the temporary files of killed processes. Call it under the lock."""
        for folder in (self.path, self.profile, self.path / "wandb"):
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)

    def state(self) -> str | None:
        """Return one of ``STATES``, or None without a status. ``running`` may be stale: see ``is_held``."""
        return self.read_status().get("state")

    @contextmanager
    def hold(self, patience: float = 0.0) -> Iterator[None]:
        """Hold the run's lock against processes of this host and of hosts that share the file system.

        The lock is the operating system's (POSIX record lock): it ends with its process, and children don't inherit it.

        Args:
            patience: seconds to try; ``is_held`` takes the lock for a moment too.

        Raises:
            RunBusyError: another process holds the lock; the message names its pid and host.
            UserError: the folder can't be written, or its file system has no locks.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / "lock").open("w")
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}. Fix: runs_dir=FOLDER") from None
        with handle:
            until = time.monotonic() + patience
            while not self._lock(handle):
                if time.monotonic() > until:
                    raise RunBusyError(self.held_by())
                time.sleep(0.05)
            yield

    def is_held(self) -> bool:
        """Return True if another process holds the lock, or if that can't be known.

        The holder must not call it: closing any handle of the file releases the lock. It needs no right to write.
        """
        try:
            with (self.path / "lock").open() as handle:
                return not self._lock(handle, shared=True)
        except FileNotFoundError:
            return False
        except (OSError, UserError):  # another user's file, or a file system without locks
            return True

    def _lock(self, handle: IO[str], *, shared: bool = False) -> bool:
        import fcntl  # not on Windows

        try:
            fcntl.lockf(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # systems differ in the error for a taken lock
            return False
        except OSError as error:
            problem = f"its file system has no locks against two processes on one run ({error.strerror})"
            raise UserError(f"{self.path}: {problem}. Fix: runs_dir=FOLDER on another file system") from None
        return True

    def held_by(self) -> str:
        """Describe the process that holds the run's lock, for error messages."""
        status = self.read_status()
        where = "another process"
        if "pid" in status:
            where = f"pid {status['pid']} on {status['host']}"
        elif status.get("job_id"):
            where = f"SLURM job {status['job_id']}"
        return f"{self.path}: {where} works on this run. Fix: stop that process or wait"


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an error about the content of a file into a ``UserError`` that names the file.

    A missing file stays a ``FileNotFoundError``. Libraries raise errors of many types for a damaged file.
    """
    try:
        yield
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        raise UserError(f"{path}: can't be read ({reason}). Fix: correct or remove the file") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file, or ``{}`` if there is no file.

    Raises:
        UserError: the file holds something else; the project never writes half a file.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}). Fix: correct or remove the file") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: no JSON object. Fix: correct or remove the file")
    return value


def read_tail(path: Path, most: int) -> list[str]:
    """Return the complete lines in the last ``most`` bytes of a file; an empty list if there is no file.

    Raises:
        UserError: the file can't be read.
    """
    try:
        with path.open("rb") as file:
            start = max(file.seek(0, os.SEEK_END) - most, 0)
            file.seek(start)
            lines = file.read().split(b"\n")[:-1]  # the text after the last newline is an unfinished line
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    return [line.decode(errors="replace") for line in lines[1 if start else 0 :]]


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, without ``best.pt``."""
    return sorted(folder.glob("step-*.pt"), reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("step-"))


def this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname()}
