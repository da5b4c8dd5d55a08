"""Start of a cluster's daemons, each in the foreground; the starter waits for its first answer."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from private_slurm.packages import PATH, ClusterError
from private_slurm.processes import daemon, start_daemon, wait_until
from private_slurm.settings import DATABASE_SOCKET, Settings

# States of a node that accepts jobs, now or when it has room.
READY = {"idle", "mix", "alloc", "comp", "plnd"}

# In memory, which takes a tenth of the time and ends with the server; on disk if mounting isn't allowed.
_NEW_DATABASE = """
mount -t tmpfs tmpfs "$0"
mariadb-install-db --skip-test-db $1 && shift && exec "$@"
"""


def run(state: Path, *command: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    """Run a command on the cluster in ``state``, outside of any job."""
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
    return subprocess.run(
        command, env=outside | {"SLURM_CONF": f"{state}/etc/slurm.conf"}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def node_states(state: Path) -> dict[str, str]:
    """Return slurmctld's states of the nodes, ``{"node1": "idle", ...}``; empty if it doesn't answer."""
    if daemon(state, "slurmctld") is None:
        return {}
    # Not by "sinfo --states=idle", which lists drained nodes too.
    lines = run(state, "sinfo", "--noheader", "--Node", "--partition=high", "--format=%N %t").stdout.splitlines()
    return dict(line.split() for line in lines)


def start_all(state: Path, settings: Settings) -> None:
    """Start all daemons in a folder with configuration files only, and wait until the nodes accept jobs."""
    _start_munged(state)
    if settings.accounting:
        _start_mariadbd(state)
        _start_slurmdbd(state)
    start_daemon(state, "slurmctld", ["slurmctld", "-D", "-f", f"{state}/etc/slurm.conf"], _environment(state))
    _wait_for(state, "slurmctld", lambda: _answers(state, "scontrol", "ping"), 30)
    for node in settings.node_names:
        start_slurmd(state, node)
    for node in settings.node_names:
        wait_for_node(state, node)


def start_slurmd(state: Path, node: str) -> None:
    with_hostname = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', node]
    slurmd = ["slurmd", "-D", "-f", f"{state}/etc/slurm.conf", "-N", node]
    start_daemon(state, node, [*with_hostname, *slurmd], _environment(state))


def wait_for_node(state: Path, node: str) -> None:
    _wait_for(state, node, lambda: node_states(state).get(node) in READY, 60)


def _start_munged(state: Path) -> None:
    munge = state / "munge"
    key = munge / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    command = ["munged", "--foreground", "--force"]  # accept a socket in a private folder
    for option, file in (("key-file", "key"), ("socket", "socket"), ("pid-file", "pid"), ("seed-file", "seed")):
        command.append(f"--{option}={munge}/{file}")
    start_daemon(state, "munged", command, _environment(state))
    _wait_for(state, "munged", lambda: _answers(state, "munge", f"--socket={munge}/socket", "--no-input"), 10)


def _start_mariadbd(state: Path) -> None:
    # With /tmp as --tmpdir it would remove other servers' temporary tables.
    places = [f"--datadir={state}/database", f"--tmpdir={state}/tmp"]
    options = ["--no-defaults", "--user=root", *places, "--innodb-log-file-size=8M"]
    server = [
        "mariadbd", *options, f"--socket={state}/{DATABASE_SOCKET}", f"--pid-file={state}/run/mariadbd.own",
        "--skip-networking",
        # slurmdbd's requirements, and commits that don't wait for the disk.
        "--innodb-lock-wait-timeout=900", "--innodb-buffer-pool-size=32M", "--innodb-flush-log-at-trx-commit=0",
    ]  # fmt: skip
    in_memory = ["unshare", "--mount", "sh", "-c", _NEW_DATABASE, f"{state}/database", " ".join(options)]
    start_daemon(state, "mariadbd", [*in_memory, *server], _environment(state))
    _wait_for(state, "mariadbd", lambda: _greets(state / DATABASE_SOCKET), 120)


def _start_slurmdbd(state: Path) -> None:
    # It finds its configuration beside SLURM_CONF. The process's name identifies it as this cluster's.
    command = ["bash", "-c", 'exec -a "slurmdbd of $0" slurmdbd -D', f"{state}/"]
    start_daemon(state, "slurmdbd", command, _environment(state) | {"MYSQL_UNIX_PORT": f"{state}/{DATABASE_SOCKET}"})
    _wait_for(state, "slurmdbd", lambda: _answers(state, "sacctmgr", "--noheader", "list", "cluster"), 60)


def _environment(state: Path) -> dict[str, str]:
    """Return a fixed environment, because jobs inherit slurmd's."""
    return {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", "SLURM_CONF": f"{state}/etc/slurm.conf"}


def _wait_for(state: Path, name: str, ready: Callable[[], bool], seconds: float) -> None:
    def ready_or_ended() -> bool:
        return daemon(state, name) is None or ready()

    in_time = wait_until(ready_or_ended, seconds)
    if in_time and daemon(state, name) is not None:
        return
    log = state / "log" / f"{name}.log"
    lines = log.read_text(errors="replace").splitlines()
    what = f"doesn't answer after {seconds:.0f} s" if not in_time else "ended"
    last = next((line for line in reversed(lines) if "fatal" in line or "rror" in line), "no message")
    raise ClusterError(f"{name} {what}: {last} (see {log})")


def _answers(state: Path, *command: str) -> bool:
    try:
        return run(state, *command, timeout=5).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _greets(path: Path) -> bool:
    """Return True if a server sends something to a new connection."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        try:
            client.connect(str(path))
            return bool(client.recv(1))
        except OSError:
            return False
