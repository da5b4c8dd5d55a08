"""The child process of a run: its worker, or torchrun with several workers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from largebatch.machine.process import LAUNCHER_PID
from largebatch.runs.folder import RunFolder

# Variables of another launcher (torchrun, an operator, a notebook), which would give a worker ranks and peers.
_OUTER = re.compile(
    r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|ROLE_NAME|PET_.*|TORCHELASTIC_.*)\Z", re.DOTALL
)


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
            env={
                **{name: value for name, value in os.environ.items() if not _OUTER.match(name)},
                **environment,
                LAUNCHER_PID: str(os.getpid()),
                "PYTHONSAFEPATH": "1",  # a random.py in the working directory doesn't replace Python's
            },
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=log,  # warnings, torchrun's lines and tracebacks; messages for the user are in the status
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on once
            preexec_fn=before_exec,
        )


def torchrun_arguments(processes: int, numa_binding: str | None, *more: str) -> list[str]:
    """Return the arguments between ``python`` and ``processes`` workers of one node, which meet as ``more`` says."""
    # Without a folder for logs, torchrun leaves one in the folder of temporary files.
    fixed = ["-m", "torch.distributed.run", "--max-restarts=0", f"--log-dir={os.devnull}"]
    binding = [] if numa_binding is None else [f"--numa-binding={numa_binding}"]
    return [*fixed, f"--nproc-per-node={processes}", *binding, *more]


# The workers of one node meet at a free port of the loopback address, which needs no host name.
ON_THIS_NODE = ("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1")


def how_it_ended(code: int) -> str:
    """Describe the exit code of a child."""
    if code >= 0:
        return f"ended with exit code {code}"
    memory = " (Linux kills processes when memory runs out)" if code == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{memory}"


def killed_rank(log: Path, logged: int) -> tuple[int, str, str] | None:
    """Return rank, host and end of a worker that a signal killed, or None.

    The source are torchrun's lines after the first ``logged`` bytes of the run's log.
    """
    if not log.exists():
        return None
    with log.open("rb") as lines:
        lines.seek(logged)
        text = lines.read().decode(errors="replace")
    pattern = r"^ *host +: (\S+)\n *rank +: (\d+) .*\n *exitcode +: -(\d+)"
    for host, rank, number in re.findall(pattern, text, re.MULTILINE):
        if int(number) != signal.SIGTERM:  # torchrun ends the other workers by it
            return int(rank), host, how_it_ended(-int(number))
    return None
