"""The child process of a run: its worker, or torchrun with several workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

from largebatch.machine.process import LAUNCHER_PID
from largebatch.runs.folder import RunFolder


def start_worker(
    folder: RunFolder,
    torchrun: Sequence[str],
    environment: dict[str, str],
    before_exec: Callable[[], None],
    stdout: int | None = None,
) -> subprocess.Popen[bytes]:
    """Start the child in a session of its own, with standard error in the run's log.

    ``torchrun`` are the arguments between ``python`` and the worker; empty for a single worker.
    """
    with folder.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *torchrun, "-m", "largebatch.training.worker", str(folder.path)],
            env={**os.environ, **environment, LAUNCHER_PID: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=log,  # warnings, torchrun's lines and tracebacks; messages for the user are in the status
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on once
            preexec_fn=before_exec,
        )


def how_it_ended(code: int) -> str:
    """Describe the exit code of a child."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
