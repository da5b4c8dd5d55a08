"""The task that SLURM starts once on every node of a job: it starts the run's workers and handles their end.

Its one child is torchrun with the workers, or a single worker. A signal (SIGUSR2 before a time limit, SIGTERM at a
preemption) reaches every process of the job. Workers save and end. torchrun and others ignore the signal, by an
inherited disposition. This process waits for the child, and has the job requeued.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

from largebatch.config.schema import ClusterConfig
from largebatch.config.typed import load_config
from largebatch.errors import UserError
from largebatch.launch.devices import thread_environment
from largebatch.launch.slurm_nodes import Heartbeat, Place
from largebatch.launch.worker_process import (
    ON_THIS_NODE,
    how_it_ended,
    killed_rank,
    start_worker,
    torchrun_arguments,
)
from largebatch.machine.process import die_with_parent
from largebatch.machine.pulse import ADDRESS, Watch
from largebatch.runs.folder import DONE, RESUMES, RunBusyError, RunFolder
from largebatch.runs.slurm_queue import ask, slurm_states

_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
_POLL_SECONDS = 0.2
_FORWARD_SECONDS = 2.0  # between signals to workers; a worker may have missed the first
_REQUEUE_SECONDS = 10.0  # part of cluster.signal_seconds that is left for requeueing
_MEET_SECONDS = 300  # for all nodes to join
_LAST_WORDS_SECONDS = 5.0
_NODE_FAILURE_SECONDS = 900.0  # SLURM notices a lost node within them; 300 by default
_LOST_NODE_SECONDS = 120.0  # until a file server releases the lock of a lost node


def carry_out_run(path: str) -> None:
    """Run or resume the run in folder ``path`` until its end, or until a signal stops this job.

    Raises:
        SystemExit: the run failed, with 1, or with 2 if the user can fix it.
    """
    received: list[int] = []  # signals
    for number in _SIGNALS:
        signal.signal(number, lambda number, _: received.append(number))
    from submitit import JobEnvironment

    job, folder = JobEnvironment(), RunFolder(path)
    place = Place(job.job_id, job.node, list(job.hostnames), int(os.environ.get("SLURM_RESTART_COUNT") or 0))
    cluster = load_config(folder.config).cluster
    if len(place.hosts) != cluster.nodes:  # else the nodes would wait for each other
        message = f"cluster.nodes={cluster.nodes}: SLURM allocated {', '.join(place.hosts)}"
        folder.update_status(state="failed", message=message, exit_code=2)
        raise SystemExit(2)
    if place.node == 0 and not _take(folder, place):
        return
    if folder.state() in DONE:  # node 0 has found the same
        return
    logged = folder.log.stat().st_size if folder.log.exists() else 0
    heartbeat = Heartbeat(folder.slurm, place)
    each = cluster.processes_per_node or 1
    watch = Watch(range(place.node * each, (place.node + 1) * each), cluster.hang_seconds)
    child = _start(folder, cluster, place, watch.port)
    _wait(child, received, cluster.signal_seconds, heartbeat, watch)
    heartbeat.end()
    if child.returncode and not received:
        if lost := heartbeat.lost_nodes():
            _wait_for_requeue(folder, place, lost, received)
        else:
            _fail(folder, cluster, place, child.returncode, logged, watch.verdict)
    _conclude(folder, cluster, place, received)


def node_arguments(cluster: ClusterConfig, place: Place) -> list[str]:
    """Return the arguments between ``python`` and the worker; empty for one process. Nodes meet on the first host."""
    if cluster.processes == 1 and cluster.numa_binding is None:
        return []
    assert cluster.processes_per_node is not None
    # By default torchrun ends the workers at other signals.
    arguments = torchrun_arguments(cluster.processes_per_node, cluster.numa_binding, "--signals-to-handle=SIGINT")
    if cluster.nodes == 1:
        return [*arguments, *ON_THIS_NODE]
    return [
        *arguments,
        f"--nnodes={cluster.nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={place.hosts[0]}:{_port(place.job_id)}",
        f"--rdzv-id={place.job_id}_{place.restarts}",
        f"--rdzv-conf=join_timeout={_MEET_SECONDS}",
    ]


def _port(job_id: str) -> int:
    """Return a port in 20000..32000, below those that systems assign. An array's jobs get different ports."""
    return 20000 + zlib.crc32(job_id.encode()) % 12000


def _take(folder: RunFolder, place: Place) -> bool:
    """Write this job into the run's status. Return False if the run is done. Exit if another process holds its lock."""
    try:
        with folder.hold(patience=_LOST_NODE_SECONDS if place.restarts else 5):
            if folder.state() in DONE:
                return False
            folder.update_status(
                state="queued", message="", exit_code=0, job_id=place.job_id, restarts=place.restarts,
                node=",".join(place.hosts), cluster="slurm",
            )  # fmt: skip
    except RunBusyError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return True


def _start(folder: RunFolder, cluster: ClusterConfig, place: Place, port: str) -> subprocess.Popen[bytes]:
    processes = cluster.processes_per_node or 1
    cores = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or os.cpu_count() or 1
    environment = thread_environment(cluster.threads, processes, int(cores)) | {ADDRESS: port}
    if cluster.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return start_worker(folder, node_arguments(cluster, place), environment, _ignore_signals)


def _ignore_signals() -> None:
    die_with_parent()
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _wait(
    child: subprocess.Popen[bytes], received: list[int], signal_seconds: int, heartbeat: Heartbeat, watch: Watch
) -> None:
    """Wait for the child's end. Forward signals to the workers; kill them shortly before SLURM's time limit.

    It polls: a signal handler during ``Popen.wait`` would find the lock of ``Popen`` taken.
    """
    end = forwarded = 0.0
    while child.poll() is None:
        heartbeat.beat()
        now = time.monotonic()
        if received and now - forwarded >= _FORWARD_SECONDS:
            end, forwarded = end or now + max(signal_seconds - _REQUEUE_SECONDS, signal_seconds / 2), now
            for pid in _descendants(child.pid):
                with contextlib.suppress(OSError):  # it has ended
                    if _handles(pid, signal.SIGUSR2):
                        os.kill(pid, signal.SIGUSR2)
        if signal.SIGUSR2 in received and now >= end:
            child.kill()  # workers die with torchrun
        if watch.look():
            watch.kill()
            child.kill()
            child.wait()
        time.sleep(_POLL_SECONDS)


def _descendants(pid: int) -> list[int]:
    with contextlib.suppress(OSError):  # it has ended
        children = [
            int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()
        ]
        return [*children, *(further for child in children for further in _descendants(child))]
    return []


def _handles(pid: int, number: signal.Signals) -> bool:
    """Return True if the process has a handler for the signal."""
    mask = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return mask is not None and bool(int(mask[1], 16) >> (number - 1) & 1)


def _wait_for_requeue(folder: RunFolder, place: Place, lost: list[str], received: list[int]) -> None:
    """Wait until SLURM requeues the job, after workers have failed because a node was lost.

    SLURM notices the loss minutes later. Failing before would end the job, and requeueing before could bring the same
    node again.
    """
    status = folder.read_status()
    if (status.get("job_id"), status.get("restarts")) != (place.job_id, place.restarts):
        raise SystemExit(1)  # this node was lost to the others, and the job has restarted without it
    names, until = " and ".join(lost), time.monotonic() + _NODE_FAILURE_SECONDS
    folder.update_status(state="preempted", message=f"{names}: lost; waiting for SLURM to requeue the job")
    while not received and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
    if not received:
        message = (
            f"{names}: lost, and SLURM didn't requeue the job within {_NODE_FAILURE_SECONDS / 60:.0f} min; {RESUMES}"
        )
        folder.update_status(state="failed", message=message, exit_code=1, ended=time.time())
        raise SystemExit(1)


def _fail(folder: RunFolder, cluster: ClusterConfig, place: Place, code: int, logged: int, hung: str) -> None:
    """Write the reason of the failure into the status and exit. A worker's own reason stays, if none was killed."""
    if code == 2 and folder.is_held():  # another launcher has started the run since, and owns the status
        raise SystemExit(2)
    status = folder.read_status()
    killed = killed_rank(folder.log, logged)
    who, how = f"the worker on {place.hosts[place.node]}", how_it_ended(code)
    if killed:
        rank, host, how = killed
        who = f"rank {rank} on {host}"
    if hung:
        who, how = place.hosts[place.node], hung
    if status["state"] in ("queued", "running") or ((killed or hung) and status["state"] == "failed"):
        before = ""
        if status["state"] == "queued" and not killed:
            before = " before training began"
            if cluster.nodes > 1:
                before += f"; the nodes may not have met at {place.hosts[0]}:{_port(place.job_id)}"
        message = f"{who} {how}{before}; see {folder.log}; {RESUMES}"
        folder.update_status(state="failed", message=message, exit_code=1, ended=time.time())
    if cluster.nodes > 1:
        time.sleep(_LAST_WORDS_SECONDS)  # SLURM then ends the other nodes' tasks, which may know the cause
    raise SystemExit(folder.read_status().get("exit_code") or 1)


def _conclude(folder: RunFolder, cluster: ClusterConfig, place: Place, received: list[int]) -> None:
    """Requeue the job or exit, by the state that the workers left. The child ended well, or after a signal."""
    if place.node != 0:
        return
    for _ in range(50):  # a file server may show another node's status late
        state = folder.state()
        if received or state not in ("queued", "running"):
            break
        time.sleep(_POLL_SECONDS)
    if received and state in ("queued", "running", "preempted"):
        _requeue(folder, cluster, place, received)
    elif state not in (*DONE, "preempted"):
        raise SystemExit(folder.read_status().get("exit_code") or 1)


def _requeue(folder: RunFolder, cluster: ClusterConfig, place: Place, received: list[int]) -> None:
    """Requeue the job, unless SLURM ends or requeues it itself, or ``cluster.max_requeues`` is reached."""
    job = None
    if place.restarts >= cluster.max_requeues:
        why = f"cluster.max_requeues={cluster.max_requeues} is reached"
    elif shutil.which("scontrol") is None:
        why = f"{place.hosts[place.node]} has no scontrol to requeue the job with"
    else:
        with contextlib.suppress(UserError):
            job = slurm_states([place.job_id]).get(place.job_id)
        # If SLURM doesn't answer, only the signal tells a time limit from a cancellation or SLURM's own requeue.
        if not (job.state == "RUNNING" if job else signal.SIGUSR2 in received):
            folder.update_status(state="preempted", message=f"SLURM ended the job; if it isn't requeued, {RESUMES}")
            return
        folder.update_status(state="preempted", message=f"requeued, {place.restarts + 1} of {cluster.max_requeues}")
        try:
            answer = ask("scontrol", "requeue", place.job_id)
            why = f"scontrol requeue: {answer.stderr.strip()}" if answer.returncode else ""
        except UserError as error:
            why = str(error)
    if why:
        folder.update_status(state="preempted", message=f"{why}; {RESUMES}")
        print(f"not requeued: {why}; {RESUMES}", file=sys.stderr)
