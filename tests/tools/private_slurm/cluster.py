"""A private, real SLURM on this machine, from Debian packages, for tests. Requires root, but no systemd or cgroups.

    python tests/tools/private_slurm/cluster.py install
    python tests/tools/private_slurm/cluster.py up /tmp/cluster   # then: export SLURM_CONF=/tmp/cluster/etc/slurm.conf
    python tests/tools/private_slurm/cluster.py status /tmp/cluster
    python tests/tools/private_slurm/cluster.py down /tmp/cluster

or, in Python, ``with Cluster("/tmp/cluster", nodes=2) as cluster: cluster.run("srun", "hostname")``.

Each node is a slurmd with its own hostname; ``settings.py`` lists a cluster's settings. All files are in one folder,
except marked lines in ``/etc/hosts`` while the cluster runs. Two clusters at a time need different ports.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if not __package__:  # started as a command
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from private_slurm import daemons
from private_slurm.hosts import add_names, remove_names
from private_slurm.packages import ClusterError, install, missing_programs
from private_slurm.processes import daemon, end_daemon, kill_daemon, kill_job_processes, kill_node_processes, wait_until
from private_slurm.settings import Settings, check, write_configuration

_FIELDS = dataclasses.fields(Settings)
_FOLDERS = ("etc", "run", "log", "munge", "slurmctld", "spool", "gpus", "database", "tmp")


class Cluster:
    """A cluster in folder ``state``, with the fields of ``Settings``.

    As a context manager it starts and stops; the folder with its logs stays.
    """

    def __init__(self, state: str | Path, **settings: int) -> None:
        self.state = Path(state).resolve()
        self.settings = Settings(**settings)  # type: ignore[arg-type]  # a bool is an int

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment variables with which SLURM's commands use this cluster."""
        return {"SLURM_CONF": f"{self.state}/etc/slurm.conf"}

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> bool:
        """Start without jobs and with an empty accounting database. Return False if the cluster runs already.

        Processes of an earlier, killed cluster in this folder are ended first.

        Raises:
            ClusterError: something is missing, taken or not allowed, or a daemon doesn't start.
        """
        check_machine(self.settings.accounting)
        check(self.state, self.settings)
        with self._hold():
            if daemon(self.state, "slurmctld") is not None and self._started_as() != self._described():
                raise ClusterError(f"{self.state}: runs with other settings. Fix: stop it first")
            if None not in self.daemons().values() and wait_until(self._takes_jobs, 10):
                return False
            self._end()
            for port in self.settings.ports:
                if is_taken(port):
                    raise ClusterError(f"port {port} is taken, perhaps by another cluster. Fix: choose another --port")
            self._lay_out()
            try:
                add_names(self.state, zip(self.settings.addresses, self.settings.node_names, strict=True))
                daemons.start_all(self.state, self.settings)
            except BaseException:
                self._end()
                raise
            return True

    def stop(self) -> bool:
        """End every process at once, jobs included. Return False if there was none."""
        if not (self.state / "cluster.json").exists():
            return False
        with self._hold():
            return self._end()

    def run(self, *command: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        """Run a command on this cluster, outside of any job."""
        return daemons.run(self.state, *command, timeout=timeout)

    def daemons(self) -> dict[str, int | None]:
        """Return each daemon's process number, None if it isn't running."""
        names = ["munged", *(["mariadbd", "slurmdbd"] if self.settings.accounting else []), "slurmctld"]
        return {name: daemon(self.state, name) for name in [*names, *self.settings.node_names]}

    def node_states(self) -> dict[str, str]:
        """Return SLURM's states of the nodes, ``{"node1": "idle", ...}``; empty if SLURM doesn't run."""
        return daemons.node_states(self.state)

    def kill_node(self, node: str, jobs: bool = True) -> None:
        """Kill a node's slurmd, and with ``jobs`` all its processes, as when a machine loses power.

        SLURM notices and requeues the node's jobs after ``node_timeout`` of ``Settings``.
        """
        if jobs:
            kill_node_processes(self.state, node)
        kill_daemon(self.state, node)

    def start_node(self, node: str) -> None:
        """Start a killed node's slurmd again, and wait until the node accepts jobs."""
        if daemon(self.state, node) is None:
            daemons.start_slurmd(self.state, node)
        daemons.wait_for_node(self.state, node)

    def _takes_jobs(self) -> bool:
        states = self.node_states()
        return all(states.get(node) in daemons.READY for node in self.settings.node_names)

    @contextmanager
    def _hold(self) -> Iterator[None]:
        """Lock the starting and stopping of this cluster; the lock ends with the process."""
        file = self.state / "cluster.lock"
        if self.state.is_dir() and any(self.state.iterdir()) and not file.exists():
            raise ClusterError(f"{self.state}: not empty, and not a cluster's folder. Fix: give a new folder")
        self.state.mkdir(parents=True, exist_ok=True)
        with file.open("w") as lock:

            def taken() -> bool:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
                return True

            if not wait_until(taken, 180):
                raise ClusterError(f"{self.state}: another process has held the lock for 180 s")
            yield

    def _lay_out(self) -> None:
        for name in _FOLDERS:
            shutil.rmtree(self.state / name, ignore_errors=True)
            (self.state / name).mkdir(mode=0o700 if name in ("munge", "slurmctld", "database") else 0o755)
        for node in self.settings.node_names:
            (self.state / "spool" / node).mkdir()
        write_configuration(self.state, self.settings)
        (self.state / "cluster.json").write_text(self._described())

    def _described(self) -> str:
        return json.dumps(dataclasses.asdict(self.settings))

    def _started_as(self) -> str:
        file = self.state / "cluster.json"
        return file.read_text() if file.exists() else ""

    def _end(self) -> bool:
        """End the processes that the folder names, whatever the settings. Return True if any ran."""
        names = [file.stem for file in (self.state / "run").glob("*.pid")]
        ran = any(daemon(self.state, name) is not None for name in names)
        end_daemon(self.state, "slurmctld", 10)  # first, so that it starts no job elsewhere
        for node in (name for name in names if name.startswith("node")):
            self.kill_node(node)
        kill_job_processes(self.state / "etc" / "slurm.conf")
        for name in ("slurmdbd", "mariadbd", "munged"):
            end_daemon(self.state, name, 20)
        remove_names(self.state)
        return ran


def is_taken(port: int) -> bool:
    """Return True if a program listens on a port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an ended program don't count
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def check_machine(accounting: bool = True) -> None:
    """Raise ClusterError if no cluster can start here."""
    if missing := missing_programs(accounting):
        raise ClusterError(missing)
    if os.geteuid() != 0:
        raise ClusterError("needs root, to give each node its own hostname")
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True, check=False).returncode != 0:
        raise ClusterError("unshare --uts: not allowed here. Fix: give CAP_SYS_ADMIN, for the nodes' hostnames")


def main() -> int:
    """Run a command. Return 0 if it succeeds (``status``: if all daemons run), else 1."""
    given = _parse()
    try:
        if given.command == "install":
            install()
            return 0
        if given.command == "up":
            return _up(Cluster(given.state, **{field.name: getattr(given, field.name) for field in _FIELDS}))
        file = given.state / "cluster.json"
        cluster = Cluster(given.state, **(json.loads(file.read_text()) if file.exists() else {}))
        return _status(cluster) if given.command == "status" else _down(cluster)
    except (ClusterError, OSError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A private, real SLURM on this machine, for tests.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install", help="install the Debian packages")
    for name, text in (("up", "start it"), ("down", "stop it, with its jobs"), ("status", "list the daemons")):
        commands.add_parser(name, help=text).add_argument("state", type=Path, metavar="STATE_DIR")
    for field in _FIELDS:
        commands.choices["up"].add_argument(
            f"--{field.name.replace('_', '-')}", default=field.default, help=f"default: {field.default}",
            **({"action": argparse.BooleanOptionalAction} if isinstance(field.default, bool) else {"type": int}),
        )  # fmt: skip
    return parser.parse_args()


def _up(cluster: Cluster) -> int:
    started = cluster.start()
    print(f"{'started' if started else 'runs already'}: export SLURM_CONF={cluster.environment['SLURM_CONF']}")
    return 0


def _down(cluster: Cluster) -> int:
    print(f"stopped; logs are in {cluster.state}/log" if cluster.stop() else f"no cluster runs in {cluster.state}")
    return 0


def _status(cluster: Cluster) -> int:
    pids, states = cluster.daemons(), cluster.node_states()
    for name, pid in pids.items():
        print(f"{name:10} {f'process {pid}' if pid else 'not running'} {states.get(name, '')}".rstrip())
    return 0 if None not in pids.values() and set(states.values()) <= daemons.READY else 1


if __name__ == "__main__":
    sys.exit(main())
