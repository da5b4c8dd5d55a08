"""A cluster's settings, and SLURM's configuration files for them."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from private_slurm.packages import ClusterError

DATABASE_SOCKET = "run/mariadbd.sock"
# A unix socket's path has at most 107 bytes; SLURM's longest is spool/node10/node10_12345678.4294967292.
_LONGEST_FOLDER = 60
# Other characters need quotes in SLURM's files, or are patterns there.
_ALLOWED = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-")


@dataclass(frozen=True)
class Settings:
    """A cluster of ``nodes`` machines named node1, node2, ..., each with these ``cpus``, ``gpus`` and ``memory`` (MB).

    The machine may have less: SLURM schedules by its configuration, and GPUs are fake, of type a100 (jobs get
    ``CUDA_VISIBLE_DEVICES``, but no device). All nodes share this machine's files, ports and processes.

    ``port``: first of the ports: ``port`` for slurmctld, +1 for slurmdbd, +2, +3, ... for the nodes.
    ``grace``: seconds that a job of partition ``low`` continues after partition ``high`` needs its node.
    ``preempt_send_user_signal``: the job then gets the signal of ``--signal`` too, besides SIGTERM.
    ``max_array_size``: SLURM's MaxArraySize (1001 by default); array indices stay below it.
    ``max_jobs``: SLURM's MaxJobCount; SLURM refuses further jobs.
    ``node_timeout``: seconds without an answer after which a node is down and its jobs are requeued. SLURM takes about
    20 s more; ``scontrol update NodeName=node1 State=DOWN Reason=test`` saves a test the wait.
    """

    nodes: int = 2
    cpus: int = 4
    gpus: int = 2
    memory: int = 8000
    accounting: bool = True
    port: int = 16817
    grace: int = 20
    preempt_send_user_signal: bool = True
    max_array_size: int = 1001
    max_jobs: int = 10000
    node_timeout: int = 10

    @property
    def node_names(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.nodes + 1)]

    @property
    def addresses(self) -> list[str]:
        return [f"127.0.1.{number}" for number in range(1, self.nodes + 1)]

    @property
    def ports(self) -> list[int]:
        return [self.port, *([self.port + 1] if self.accounting else []), *self.node_ports]

    @property
    def node_ports(self) -> list[int]:
        return [self.port + 1 + number for number in range(1, self.nodes + 1)]


def check(state: Path, settings: Settings) -> None:
    """Check folder and settings before anything is written.

    Raises:
        ClusterError: with the value and the allowed values.
    """
    if len(str(state)) > _LONGEST_FOLDER:
        raise ClusterError(f"{state}: too long for sockets in it; allowed: at most {_LONGEST_FOLDER} characters")
    if not set(str(state)) <= _ALLOWED:
        raise ClusterError(f"{state}: allowed: only letters, digits and / . _ -")
    for name, least, most in (
        ("nodes", 1, 99), ("cpus", 1, 1024), ("gpus", 0, 64), ("memory", 256, 1 << 24), ("port", 1024, 65000),
        ("grace", 0, 3600), ("max_array_size", 1, 4000000), ("max_jobs", 2, 1000000), ("node_timeout", 5, 3600),
    ):  # fmt: skip
        if not least <= getattr(settings, name) <= most:
            raise ClusterError(f"{name}={getattr(settings, name)}: allowed: {least} to {most}")


def write_configuration(state: Path, settings: Settings) -> None:
    """Write slurm.conf and the files beside it into ``state/etc``."""
    etc = state / "etc"
    (etc / "slurm.conf").write_text("".join(f"{line}\n" for line in _slurm_conf(state, settings)))
    (etc / "cgroup.conf").write_text("CgroupAutomount=no\n")
    # slurmd requires a device as the File of a GPU; any device works.
    for number in range(settings.gpus):
        (state / "gpus" / f"gpu{number}").symlink_to("/dev/null")
    each = f"NodeName={_list(settings.node_names)} Name=gpu Type=a100 File={state}/gpus/gpu"
    (etc / "gres.conf").write_text("".join(f"{each}{number}\n" for number in range(settings.gpus)))
    if settings.accounting:
        slurmdbd_conf = etc / "slurmdbd.conf"
        slurmdbd_conf.touch(mode=0o600)  # slurmdbd reads no other
        slurmdbd_conf.write_text("".join(f"{line}\n" for line in _slurmdbd_conf(state, settings)))


def _slurm_conf(state: Path, settings: Settings) -> Iterator[str]:
    yield "ClusterName=largebatch"
    yield f"SlurmctldHost={socket.gethostname().split('.')[0]}(127.0.0.1)"
    yield f"SlurmctldPort={settings.port}"
    yield "SlurmUser=root"
    # A requeued job waits for cred_expire before it starts again; SLURM requires at least 5.
    yield f"AuthInfo=socket={state}/munge/socket,cred_expire=5"
    yield f"StateSaveLocation={state}/slurmctld"
    yield f"SlurmdSpoolDir={state}/spool/%n"
    yield f"SlurmdLogFile={state}/log/%n.steps.log"  # else job steps have no log
    yield f"SlurmctldPidFile={state}/run/slurmctld.own"
    yield f"SlurmdPidFile={state}/run/%n.own"
    yield "MailProg=/bin/true"
    # Nodes and jobs without systemd, control groups or MPI.
    yield "ProctrackType=proctrack/linuxproc"
    yield "TaskPlugin=task/none"
    yield "MpiDefault=none"
    yield "PropagateResourceLimits=NONE"
    # The shortest possible waits.
    yield "SchedulerParameters=batch_sched_delay=0,sched_min_interval=200000,sched_interval=2,bf_interval=2"
    yield "KillWait=5"
    yield "CompleteWait=0"
    yield "InactiveLimit=0"
    yield f"SlurmdTimeout={settings.node_timeout}"
    yield "ReturnToService=2"
    # Two clusters on one machine need different job numbers, because jobs derive ports from them.
    yield f"FirstJobId={random.randrange(1_000_000, 9_000_000)}"
    yield f"MaxArraySize={settings.max_array_size}"
    yield f"MaxJobCount={settings.max_jobs}"
    yield "SelectType=select/cons_tres"
    yield "SelectTypeParameters=CR_CPU_Memory"
    yield "DefMemPerCPU=200"
    yield "SlurmdParameters=config_overrides"  # more CPUs and memory than this machine has
    yield "CommunicationParameters=NoCtldInAddrAny"  # slurmctld listens on 127.0.0.1
    yield "PreemptType=preempt/partition_prio"
    yield "PreemptMode=REQUEUE"
    if settings.preempt_send_user_signal:
        yield "SlurmctldParameters=preempt_send_user_signal"
    if settings.accounting:
        yield "AccountingStorageType=accounting_storage/slurmdbd"
        yield "AccountingStorageHost=127.0.0.1"
        yield f"AccountingStoragePort={settings.port + 1}"
        yield f"AccountingStoragePass={state}/munge/socket"  # slurmdbd's clients don't look at AuthInfo
        yield "AccountingStorageTRES=gres/gpu"
        yield "JobAcctGatherType=jobacct_gather/linux"
        yield "JobAcctGatherFrequency=5"
    nodes = _list(settings.node_names)
    yield "GresTypes=gpu"
    yield (
        f"NodeName={nodes} NodeHostname={nodes} NodeAddr={_list(settings.addresses)} Port={_list(settings.node_ports)} "
        f"CPUs={settings.cpus} RealMemory={settings.memory}"
        + (f" Gres=gpu:a100:{settings.gpus}" if settings.gpus else "")
    )
    times = "MaxTime=60 DefaultTime=10"
    yield f"PartitionName=high Nodes={nodes} {times} Default=YES PriorityTier=10 PreemptMode=OFF"
    yield f"PartitionName=low Nodes={nodes} {times} PriorityTier=1 PreemptMode=REQUEUE GraceTime={settings.grace}"


def _slurmdbd_conf(state: Path, settings: Settings) -> Iterator[str]:
    yield f"AuthInfo=socket={state}/munge/socket"
    yield "DbdHost=localhost"
    yield "DbdAddr=127.0.0.1"
    yield f"DbdPort={settings.port + 1}"
    yield "SlurmUser=root"
    yield f"PidFile={state}/run/slurmdbd.own"
    yield "StorageType=accounting_storage/mysql"
    yield "StorageHost=localhost"  # the socket that MYSQL_UNIX_PORT names
    yield "StorageUser=root"


def _list(values: list[str] | list[int]) -> str:
    return ",".join(str(value) for value in values)
