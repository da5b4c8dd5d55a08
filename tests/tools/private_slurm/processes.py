"""Which processes are a cluster's own; starting, finding and ending them.

A daemon's pid file counts only while ``/proc/PID/cmdline`` still names the cluster's folder, so that a number which the
system has given to another process meanwhile is never signalled.
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

# The pid file is there before the daemon begins: what exec puts in the shell's place keeps its number.
_START = 'echo $$ >"$0" && exec "$@"'
_LOOK_EVERY = 0.02  # seconds


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether ``condition`` came true within ``seconds`` by the clock."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(_LOOK_EVERY)
    return True


def start_daemon(state: Path, name: str, command: Iterable[str], environment: Mapping[str, str]) -> None:
    """Start a program in the foreground of a session of its own; no child of ours, so that the system reaps it.

    What it says goes to ``log/NAME.log``, its number to ``run/NAME.pid``.
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
    """The number of a running daemon of this cluster, if it runs."""
    try:
        pid = int((state / "run" / f"{name}.pid").read_text())
        return pid if f"{state}/".encode() in _command(pid) else None
    except (OSError, ValueError):
        return None


def end_daemon(state: Path, name: str, seconds: float) -> None:
    """Ask a daemon to end, and kill it where it hasn't after ``seconds``; with what it was just running."""
    if (pid := daemon(state, name)) is not None:
        for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, 10.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)
            wait_until(lambda: daemon(state, name) is None, patience)
    (state / "run" / f"{name}.pid").unlink(missing_ok=True)


def kill_daemon(state: Path, name: str) -> None:
    """Kill a daemon without asking."""
    if (pid := daemon(state, name)) is not None:
        _send(pid, signal.SIGKILL)
        wait_until(lambda: daemon(state, name) is None, 10)
    (state / "run" / f"{name}.pid").unlink(missing_ok=True)


def kill_node_processes(state: Path, name: str) -> None:
    """Pull a node's plug: kill its slurmd and all that it started, which shares its hostname's namespace."""
    pid = daemon(state, name)
    with _held_namespaces([] if pid is None else [pid]) as namespaces:
        _kill_all(lambda: [pid for pid in _all_processes() if _namespace(pid) in namespaces])


def kill_job_processes(configuration: Path) -> None:
    """Kill what is left of jobs whose slurmd is gone, and what shares their hostname's namespace.

    They are known by the cluster's configuration and a job's number in their environment: a shell in which a user
    merely set ``SLURM_CONF`` has no job.
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
    """The hostnames' namespaces of processes, but never the machine's, in which a node is for a moment when it starts.

    They are kept open meanwhile: another cluster's node would get the number of one that is gone.
    """
    with contextlib.ExitStack() as held:
        namespaces: set[int | None] = set()
        for pid in pids:
            with contextlib.suppress(OSError):  # it has ended
                namespace = held.enter_context(open(f"/proc/{pid}/ns/uts", "rb"))
                namespaces.add(os.fstat(namespace.fileno()).st_ino)
        yield namespaces - {None, _namespace(os.getpid()), _namespace(1)}


def _namespace(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}/ns/uts").st_ino
    except OSError:  # it has ended
        return None


def _command(pid: int) -> bytes:
    """The command line; empty for what has ended and isn't reaped yet."""
    file, end = Path(f"/proc/{pid}/cmdline"), time.monotonic() + 1
    while not (command := file.read_bytes()) and not _has_ended(pid) and time.monotonic() < end:
        time.sleep(0.001)  # empty too for a moment while exec puts a program in another's place
    return command


def _has_ended(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"


def _all_processes() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _kill_all(left: Callable[[], list[int]]) -> None:
    """Kill and look again until none is left: a process may start another while we read the list."""

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
