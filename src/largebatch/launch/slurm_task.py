"""What SLURM starts, once on every node of a job: the run's workers, and what follows from how they end.

The workers are the children of one child process here: torchrun, or the only worker itself. A signal (SIGUSR2 before
a time limit, SIGTERM at a preemption) reaches every process of the job. Workers save and end; torchrun and others
ignore it, by a disposition that is inherited; this process waits, and has the job requeued.
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
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from largebatch.config.schema import ClusterConfig, load_config
from largebatch.errors import UserError
from largebatch.launch.devices import thread_environment
from largebatch.launch.slurm_nodes import Heartbeat
from largebatch.machine.process import LAUNCHER_PID, die_with_parent
from largebatch.runs.folder import DONE, RESUMES, RunBusyError, RunFolder
from largebatch.runs.slurm_queue import ask, slurm_states

_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
_POLL_SECONDS = 0.2
_FORWARD_SECONDS = 2.0  # between signals to workers, of which some may not have been ready for the first
_REQUEUE_SECONDS = 10.0  # kept of cluster.signal_seconds for requeueing
_MEET_SECONDS = 300  # for all nodes to be there
_LAST_WORDS_SECONDS = 5.0
_NODE_FAILURE_SECONDS = 900.0  # in which SLURM finds out that a node is down; by default it takes 300
_LOST_NODE_SECONDS = 120.0  # until a file server gives up the lock of a node that is gone


@dataclass(frozen=True)
class Place:
    """Where in which job this process is."""

    job_id: str  # 12, or 12_3 in an array
    node: int
    hosts: list[str]
    restarts: int


def carry_out_run(path: str) -> None:
    """Bring the run in folder ``path`` as far as it gets in this job. Exits with 1 or 2 where it failed."""
    asked: list[int] = []  # the signals that came

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    for number in _SIGNALS:
        signal.signal(number, note)
    folder, place = RunFolder(path), _place()
    cluster = load_config(folder.config).cluster
    if len(place.hosts) != cluster.nodes:  # a wrong guess would have the nodes wait for each other
        message = f"cluster.nodes={cluster.nodes}, but SLURM gave {', '.join(place.hosts)} for it"
        folder.update_status(state="failed", message=message, exit_code=2)
        raise SystemExit(2)
    if place.node == 0 and not _take(folder, place):
        return
    if folder.state() in DONE:  # what another node has found is true on this one
        return
    logged = folder.log.stat().st_size if folder.log.exists() else 0
    heartbeat = Heartbeat(folder.path.parent / ".slurm", f"{place.job_id}_{place.restarts}", place.node, place.hosts)
    child = _start(folder, cluster, place)
    _wait(child, asked, cluster.signal_seconds, heartbeat)
    heartbeat.end()
    if child.returncode and not asked:
        if lost := heartbeat.lost_nodes():
            _wait_for_requeue(folder, place, lost, asked)
        else:
            _fail(folder, cluster, place, child.returncode, logged)
    _conclude(folder, cluster, place, asked)


def torchrun_arguments(cluster: ClusterConfig, place: Place) -> list[str]:
    """Of ``python``, before the worker's; none where one process is all. The nodes meet on the first host."""
    if cluster.processes == 1:
        return []
    arguments = ["-m", "torch.distributed.run", "--max-restarts=0", f"--nproc-per-node={cluster.processes_per_node}"]
    # Handled by torchrun itself they would end the workers.
    arguments.append("--signals-to-handle=SIGINT")
    if cluster.nodes == 1:
        return [*arguments, "--standalone"]  # the system picks a free port
    return [
        *arguments,
        f"--nnodes={cluster.nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={place.hosts[0]}:{_port(place.job_id)}",
        f"--rdzv-id={place.job_id}_{place.restarts}",
        f"--rdzv-conf=join_timeout={_MEET_SECONDS}",
    ]


def _place() -> Place:
    from submitit import JobEnvironment

    job = JobEnvironment()
    return Place(job.job_id, job.node, list(job.hostnames), int(os.environ.get("SLURM_RESTART_COUNT") or 0))


def _port(job_id: str) -> int:
    """From 20000 to 32000, below those that systems give out; of an array's jobs on one node each has another."""
    return 20000 + zlib.crc32(job_id.encode()) % 12000


def _take(folder: RunFolder, place: Place) -> bool:
    """Write down who carries the run out; False where it is done.

    Raises:
        SystemExit: where another process has it. Its status is that one's.
    """
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


def _start(folder: RunFolder, cluster: ClusterConfig, place: Place) -> subprocess.Popen[bytes]:
    processes = cluster.processes_per_node or 1
    cores = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or os.cpu_count() or 1
    environment = {**os.environ, **thread_environment(cluster.threads, processes, int(cores))}
    environment[LAUNCHER_PID] = str(os.getpid())
    if cluster.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    worker = ["-m", "largebatch.training.worker", str(folder.path)]
    command = [sys.executable, *torchrun_arguments(cluster, place), *worker]
    with folder.log.open("ab") as log:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stderr=log, start_new_session=True,
            preexec_fn=_ignore_signals,
        )  # fmt: skip


def _ignore_signals() -> None:
    die_with_parent()
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _wait(child: subprocess.Popen[bytes], asked: list[int], signal_seconds: int, heartbeat: Heartbeat) -> None:
    """Until the child ends, which a signal makes it do; shortly before the time limit kills the job, without it.

    It polls, because a handler that came within ``Popen.wait`` would find its lock taken.
    """
    end = forwarded = 0.0
    while child.poll() is None:
        heartbeat.beat()
        now = time.monotonic()
        if asked and now - forwarded >= _FORWARD_SECONDS:
            end, forwarded = end or now + max(signal_seconds - _REQUEUE_SECONDS, signal_seconds / 2), now
            for pid in _descendants(child.pid):
                if _handles(pid, signal.SIGUSR2):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGUSR2)
        if signal.SIGUSR2 in asked and now >= end:
            for pid in [child.pid, *_descendants(child.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)


def _descendants(pid: int) -> list[int]:
    with contextlib.suppress(OSError):  # it has ended
        children = [
            int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()
        ]
        return [*children, *(further for child in children for further in _descendants(child))]
    return []


def _handles(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for a signal, and would neither ignore it nor die of it."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def _wait_for_requeue(folder: RunFolder, place: Place, lost: list[str], asked: list[int]) -> None:
    """Stay, after workers have failed because they lost a node's, until SLURM requeues the job for the same reason.

    SLURM notices minutes later. A failure said before would end the job for good, and a requeue asked for before could
    be given the same node again.
    """
    status = folder.read_status()
    if (status.get("job_id"), status.get("restarts")) != (place.job_id, place.restarts):
        raise SystemExit(1)  # this node is the one that was lost to the others: the job has begun anew without it
    names, until = " and ".join(lost), time.monotonic() + _NODE_FAILURE_SECONDS
    folder.update_status(state="preempted", message=f"{names}: lost; waiting for SLURM to requeue the job")
    while not asked and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
    if not asked:
        message = (
            f"{names}: lost, and SLURM didn't requeue the job within {_NODE_FAILURE_SECONDS / 60:.0f} min; {RESUMES}"
        )
        folder.update_status(state="failed", message=message, exit_code=1, ended=time.time())
        raise SystemExit(1)


def _fail(folder: RunFolder, cluster: ClusterConfig, place: Place, code: int, logged: int) -> None:
    """Say how the child failed where no worker has said it, or only that it lost another one; exit likewise."""
    if code == 2 and folder.is_held():  # taken by another launcher in the moment between; the status is that one's
        raise SystemExit(2)
    status = folder.read_status()
    where, how = place.hosts[place.node], f"ended with exit code {code}"
    if code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
    killed = _killed_worker(folder.log, logged)
    if killed:
        where, how = killed
    if status["state"] in ("queued", "running") or (killed and status["state"] == "failed"):
        before = ""
        if status["state"] == "queued" and not killed:
            before = " before training began"
            if cluster.nodes > 1:
                before += f"; the nodes may not have met at {place.hosts[0]}:{_port(place.job_id)}"
        message = f"the worker on {where} {how}{before}; see {folder.log}; {RESUMES}"
        folder.update_status(state="failed", message=message, exit_code=1, ended=time.time())
    if cluster.nodes > 1:
        time.sleep(_LAST_WORDS_SECONDS)  # SLURM ends the other nodes' tasks with this one, and theirs may be the cause
    raise SystemExit(folder.read_status().get("exit_code") or 1)


def _killed_worker(log: Path, logged: int) -> tuple[str, str] | None:
    """Host and end of a worker that a signal ended, from what torchrun wrote after the first ``logged`` bytes."""
    with log.open("rb") as lines:
        lines.seek(logged)
        text = lines.read().decode(errors="replace")
    for host, number in re.findall(r"^ *host +: (\S+)\n.*\n *exitcode +: -(\d+)", text, re.MULTILINE):
        if int(number) != signal.SIGTERM:  # by which torchrun ends the others
            return host, f"was ended by {signal.Signals(int(number)).name}"
    return None


def _conclude(folder: RunFolder, cluster: ClusterConfig, place: Place, asked: list[int]) -> None:
    """What follows from the state that the workers left. The child ended well, or after a signal."""
    if place.node != 0:
        return
    state = folder.state()
    for _ in range(50):  # a file server may show another node's last words late
        if asked or state not in ("queued", "running"):
            break
        time.sleep(_POLL_SECONDS)
        state = folder.state()
    if state == "preempted" or (asked and state in ("queued", "running")):
        _requeue(folder, cluster, place, asked)
    elif state not in DONE:
        raise SystemExit(folder.read_status().get("exit_code") or 1)


def _requeue(folder: RunFolder, cluster: ClusterConfig, place: Place, asked: list[int]) -> None:
    """Have the same job continue the run, unless SLURM ends or requeues it itself, or it was requeued often enough."""
    if not asked:  # somebody stopped the worker by hand
        return
    if place.restarts >= cluster.max_requeues:
        why = f"cluster.max_requeues={cluster.max_requeues} is reached"
    elif shutil.which("scontrol") is None:
        why = f"{place.hosts[place.node]} has no scontrol to requeue the job with"
    else:
        if not _still_ours(place.job_id, signal.SIGUSR2 in asked):
            folder.update_status(state="preempted", message="SLURM ended the job; if it doesn't requeue it, " + RESUMES)
            return
        folder.update_status(state="preempted", message=f"requeued, {place.restarts + 1} of {cluster.max_requeues}")
        why = _scontrol_requeue(place.job_id)
    if why:
        folder.update_status(state="preempted", message=f"{why}; {RESUMES}")
        print(f"not requeued: {why}; {RESUMES}", file=sys.stderr)


def _still_ours(job_id: str, otherwise: bool) -> bool:
    """Whether SLURM would have the job run on: not if its user cancelled it, or SLURM requeues it itself."""
    with contextlib.suppress(UserError):
        job = slurm_states([job_id]).get(job_id)
        if job is not None:
            return job.state == "RUNNING"
    return otherwise


def _scontrol_requeue(job_id: str) -> str:
    """Empty, or why it could not be."""
    try:
        answer = ask("scontrol", "requeue", job_id)
    except UserError as error:
        return str(error)
    return "" if answer.returncode == 0 else f"scontrol requeue: {answer.stderr.strip()}"
