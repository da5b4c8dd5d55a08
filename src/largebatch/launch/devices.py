"""Devices and processes of a run: of this machine, found without torch, or of the SLURM request."""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

from largebatch.config.batch import plan_training
from largebatch.config.schema import ClusterConfig, Config
from largebatch.config.slurm import gpu_requests, gpus_in_words, gpus_per_node
from largebatch.errors import UserError


def resolve_devices(config: Config) -> None:
    """Set ``cluster.device``, ``cluster.processes`` and ``batch_norm_size``, and check the division of the batch.

    The values come from this machine, or with ``cluster=slurm`` from the request to SLURM.

    Raises:
        UserError: if a GPU is missing, or the batch can't be divided over the processes.
    """
    cluster = config.cluster
    if cluster.name == "slurm":
        _resolve_request(cluster)
    else:
        _resolve_here(cluster)
    assert cluster.processes is not None
    _check_numa_binding(cluster)
    plan_training(config, cluster.processes)


def in_words(cluster: ClusterConfig) -> str:
    """Describe the processes and devices of a run, such as ``2 nodes x 4 processes on cuda, 32 CPUs each``."""
    processes = cluster.processes or 1
    if cluster.name != "slurm":
        return f"{_counted(processes, 'process')} on {cluster.device}"
    each = processes // cluster.nodes
    words = f"{_counted(cluster.nodes, 'node')} x {_counted(each, 'process')} on {cluster.device}"
    if cluster.cpus_per_node is not None:
        words += f", {_counted(cluster.cpus_per_node, 'CPU')} each"
    if gpus := gpus_per_node(cluster):
        words += f"; GPUs of a node: {gpus_in_words(gpus)}"
        if unused := sum(gpus.values()) - (each if cluster.device == "cuda" else 0):
            words += f", {unused} of them unused"
    return words + (f"; time limit {cluster.time_limit}" if cluster.time_limit is not None else "")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "es" if what.endswith("s") else "s")


def _resolve_request(cluster: ClusterConfig) -> None:
    for name in ("SBATCH_GRES", "SBATCH_GPUS", "SBATCH_GPUS_PER_NODE", "SBATCH_GPUS_PER_TASK"):
        if name in os.environ:  # sbatch prefers it to the script's own option
            raise UserError(
                f"{name}={os.environ[name]}: sets GPUs for sbatch. Fix: unset it, set cluster.gpus_per_node"
            )
    gpus = sum(gpus_per_node(cluster).values())
    if cluster.device == "cuda" and not gpus:
        raise UserError("cluster.device=cuda: the job requests no GPU. Fix: set cluster.gpus_per_node")
    if cluster.device == "auto":
        cluster.device = "cuda" if gpus else "cpu"
    if cluster.processes is not None:
        cluster.processes_per_node = cluster.processes // cluster.nodes
    each = cluster.processes_per_node or (max(1, gpus) if cluster.device == "cuda" else 1)
    if cluster.device == "cuda" and gpus and each > gpus:
        (request,) = (f"{key}={value}" for key, value in gpu_requests(cluster).items())
        raise UserError(f"cluster.processes_per_node={each}: needs a GPU each, but {request} is {gpus} on a node")
    cluster.processes_per_node, cluster.processes = each, cluster.nodes * each


def _resolve_here(cluster: ClusterConfig) -> None:
    if cluster.device == "cpu" and cluster.devices:
        raise UserError(f"cluster.devices={cluster.devices}: not allowed with cluster.device=cpu")
    gpus = chosen_gpus(cluster)
    if cluster.device == "cuda" and not gpus:
        raise UserError("cluster.device=cuda: no GPU found here. Allowed: auto, cpu")
    cluster.device = "cuda" if gpus else "cpu"
    cluster.processes = cluster.processes or max(1, len(gpus))
    if gpus and cluster.processes > len(gpus):
        raise UserError(f"cluster.processes={cluster.processes}: needs a GPU each, but found {len(gpus)} GPU(s)")


def _check_numa_binding(cluster: ClusterConfig) -> None:
    if cluster.numa_binding is None:
        return
    given = f"cluster.numa_binding={cluster.numa_binding}"
    if cluster.device != "cuda":
        raise UserError(f"{given}: binds processes to CPUs near their GPUs, and the run is on CPU. Fix: leave it out")
    if cluster.python is None and shutil.which("numactl") is None:  # a container may have its own
        raise UserError(f"{given}: needs numactl, which isn't on PATH here. Fix: install numactl, or leave it out")


def chosen_gpus(cluster: ClusterConfig) -> list[str]:
    """Return the identifiers of the GPUs that the runs of a plan share; none on CPU.

    Raises:
        UserError: if ``cluster.devices`` has an index without a GPU.
    """
    if cluster.device == "cpu":
        return []
    visible = _visible_gpus()
    if cluster.devices is None:
        return visible
    if any(not 0 <= index < len(visible) for index in cluster.devices):
        raise UserError(f"cluster.devices={cluster.devices}: {len(visible)} GPU(s) found here, numbered from 0")
    return [visible[index] for index in cluster.devices]


def worker_environment(cluster: ClusterConfig, gpus: list[str], parallel: int) -> dict[str, str]:
    """Return environment variables for a run's ``gpus``, and for its threads if ``parallel`` runs share the cores."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS
    cores = here // parallel
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} | thread_environment(cluster.threads, cluster.processes or 1, cores)


def thread_environment(threads: int | None, processes: int, cores: int) -> dict[str, str]:
    """Return environment variables for threads and memory. Variables that the user has set stay, but OMP_NUM_THREADS.

    There are ``threads`` per process, or ``cores`` divided over ``processes``.
    """
    threads = threads or max(1, cores // processes)
    defaults = {
        # Threads that spin while waiting make a step several times slower if other programs use the same cores.
        "OMP_WAIT_POLICY": "PASSIVE",
        # glibc gives large blocks back to the system, and then each page of the next block is a page fault: a sixth of
        # the time of a small network's training on a CPU. These keep blocks below 256 MiB, up to 1 GiB in all.
        "MALLOC_MMAP_THRESHOLD_": str(2**28),
        "MALLOC_TRIM_THRESHOLD_": str(2**30),
    }
    return {"OMP_NUM_THREADS": str(threads)} | {name: os.environ.get(name, defaults[name]) for name in defaults}


def _visible_gpus() -> list[str]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES lists, or every GPU of the machine if it is unset.

    CUDA ignores the list from the first entry on that isn't a GPU of the machine, such as SLURM's ``NoDevFiles``.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(index) for index in range(_gpus_of_the_machine()[0])]
    names = [name.strip() for name in named.split(",")]
    return list(itertools.takewhile(_exists, names))


def _exists(name: str) -> bool:
    """Return True for the index of a GPU of this machine, or the beginning of a UUID such as ``GPU-8932f937``."""
    count, uuids = _gpus_of_the_machine()
    if name.isdecimal():
        return int(name) < count
    return name.startswith(("GPU-", "MIG-")) and any(uuid.startswith(name) for uuid in uuids)


@functools.cache  # a grid calls this for each run
def _gpus_of_the_machine() -> tuple[int, list[str]]:
    """Return the number of GPUs, and the UUIDs of GPUs and their MIG parts."""
    if shutil.which("nvidia-smi"):
        listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    else:  # as in some containers
        listing = "".join(file.read_text() for file in Path("/proc/driver/nvidia/gpus").glob("*/information"))
    uuids = re.findall(r"UUID:\s+([\w/-]+)", listing)
    return sum(uuid.startswith("GPU-") for uuid in uuids), uuids
