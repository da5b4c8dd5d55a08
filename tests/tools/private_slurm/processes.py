"""The start, search and end of a cluster's processes.

A daemon's pid file counts only while ``/proc/PID/cmdline`` names the cluster's folder, so that another process with the
same number is never signalled.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from private_slurm.packages import ClusterError

# The shell writes the pid file first; exec keeps the process number.
_START = 'echo $$ >"$0" && exec "$@"'
_LOOK_EVERY = 0.02  # seconds


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for ``condition``. Return False if it isn't true within ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(_LOOK_EVERY)
    return True


def start_daemon(state: Path, name: str, command: Iterable[str], environment: Mapping[str, str]) -> None:
    """Start a program in a session of its own; it is no child of this process, so that the system reaps it.

    Its output goes to ``log/NAME.log``, its number to ``run/NAME.pid``.
    """
    pid_file = state / "run" / f"{name}.pid"
    pid_file.unlink(missing_ok=True)
    with (state / "log" / f"{name}.log").open("ab") as log:
        subprocess.run(
            ["setsid", "--fork", "sh", "-c", _START, str(pid_file), *command],
            env=environment, cwd=state, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True,
        )  # fmt: skip
    if not wait_until(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"), 10):
        raise ClusterError(f"{name} could not be started; see {state}/log/{name}.log")


def daemon(state: Path, name: str) -> int | None:
    """Return the process number of a daemon of this cluster, None if it isn't running."""
    try:
        pid = int((state / "run" / f"{name}.pid").read_text())
        return pid if f"{state}/".encode() in _command(pid) else None
    except (OSError, ValueError):
        return None


def end_daemon(state: Path, name: str, seconds: float) -> None:
    """Terminate a daemon and its process group; kill them after ``seconds``."""
    if (pid := daemon(state, name)) is not None:
        for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, 10.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)
            wait_until(lambda: daemon(state, name) is None, patience)
    (state / "run" / f"{name}.pid").unlink(missing_ok=True)


def kill_daemon(state: Path, name: str) -> None:
    """Kill a daemon at once."""
    if (pid := daemon(state, name)) is not None:
        _send(pid, signal.SIGKILL)
        wait_until(lambda: daemon(state, name) is None, 10)
    (state / "run" / f"{name}.pid").unlink(missing_ok=True)


def kill_node_processes(state: Path, name: str) -> None:
    """Kill a node's slurmd and all its processes, which share its hostname's namespace."""
    pid = daemon(state, name)
    with _held_namespaces([] if pid is None else [pid]) as namespaces:
        _kill_all(lambda: [pid for pid in _all_processes() if _namespace(pid) in namespaces])


def kill_job_processes(configuration: Path) -> None:
    """Kill the processes of jobs whose slurmd has ended, and those that share their hostname's namespace.

    Their environment has the cluster's configuration and a job's number; a user's shell with ``SLURM_CONF`` has no job.
    """

    def of_jobs() -> list[int]:
        return [pid for pid in _all_processes() if pid != os.getpid() and _is_of_a_job(pid, configuration)]

    with _held_namespaces(of_jobs()) as namespaces:
        _kill_all(lambda: [*of_jobs(), *(pid for pid in _all_processes() if _namespace(pid) in namespaces)])


def _is_of_a_job(pid: int, configuration: Path) -> bool:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return False
    has_number = any(variable.startswith(b"SLURM_JOB_ID=") for variable in variables)
    return f"SLURM_CONF={configuration}".encode() in variables and (has_number or name == "slurmstepd")


@contextlib.contextmanager
def _held_namespaces(pids: Iterable[int]) -> Iterator[set[int | None]]:
    """Return the hostnames' namespaces of processes, except the machine's, where a starting node is for a moment.

    They stay open meanwhile, so that another cluster's node can't get the number of a closed namespace.
    """
    with contextlib.ExitStack() as held:
        namespaces: set[int | None] = set()
        for pid in pids:
            with contextlib.suppress(OSError):  # the process has ended
                namespace = held.enter_context(open(f"/proc/{pid}/ns/uts", "rb"))
                namespaces.add(os.fstat(namespace.fileno()).st_ino)
        yield namespaces - {None, _namespace(os.getpid()), _namespace(1)}


def _namespace(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}/ns/uts").st_ino
    except OSError:  # the process has ended
        return None


def _command(pid: int) -> bytes:
    """Return the command line; empty for a zombie."""
    file, end = Path(f"/proc/{pid}/cmdline"), time.monotonic() + 1
    while not (command := file.read_bytes()) and not _has_ended(pid) and time.monotonic() < end:
        time.sleep(0.001)  # empty for a moment during exec too
    return command


def _has_ended(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"


def _all_processes() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _kill_all(left: Callable[[], list[int]]) -> None:
    """Kill until no process is left; a process may start another while the list is read."""

    def none_left() -> bool:
        pids = left()
        for pid in pids:
            _send(pid, signal.SIGKILL)
        return not pids

    if not wait_until(none_left, 10):
        raise ClusterError(f"processes {left()} can't be killed")


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
