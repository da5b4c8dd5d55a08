"""What this machine has to run on, found without torch; on SLURM what is asked for."""

import functools
import os
import shutil
import subprocess

from largebatch.config.batch import plan_batch
from largebatch.config.schema import ClusterConfig, Config
from largebatch.errors import UserError


def resolve_devices(config: Config) -> None:
    """Fill in ``cluster.device`` and ``cluster.processes`` from this machine, and check that the batch divides.

    For SLURM, from what is asked of it: what this machine has is no matter then.

    Raises:
        UserError: for GPUs that aren't there, or a batch that can't be divided over the processes.
    """
    cluster = config.cluster
    if cluster.name == "slurm":
        _resolve_request(cluster)
    else:
        _resolve_here(cluster)
    assert cluster.processes is not None
    plan_batch(config.batch_size, cluster.processes, config.micro_batch, config.optimizer.samples_together)


def _resolve_request(cluster: ClusterConfig) -> None:
    gpus = cluster.gpus_per_node or 0
    otherwise = [key for key in cluster.options if key.startswith(("gres", "gpus"))]
    if cluster.device == "cuda" and not gpus and not otherwise:
        raise UserError("cluster.device=cuda: no GPU is asked for; set cluster.gpus_per_node")
    if cluster.device == "auto":
        cluster.device = "cuda" if gpus else "cpu"
    if cluster.processes is not None:
        cluster.processes_per_node = cluster.processes // cluster.nodes
    each = cluster.processes_per_node or (max(1, gpus) if cluster.device == "cuda" else 1)
    if cluster.device == "cuda" and gpus and each > gpus:
        raise UserError(f"cluster.processes_per_node={each}: one process a GPU, and cluster.gpus_per_node={gpus}")
    cluster.processes_per_node, cluster.processes = each, cluster.nodes * each


def _resolve_here(cluster: ClusterConfig) -> None:
    if cluster.device == "cpu":
        gpus: list[str] = []
        if cluster.devices:
            raise UserError(f"cluster.devices={cluster.devices}: names GPUs, but cluster.device=cpu")
    else:
        gpus = _chosen_gpus(cluster)
    if cluster.device == "cuda" and not gpus:
        raise UserError("cluster.device=cuda: no GPU was found here; allowed: auto, cpu")
    cluster.device = "cuda" if gpus else "cpu"
    cluster.processes = cluster.processes or max(1, len(gpus))
    if gpus and cluster.processes > len(gpus):
        raise UserError(f"cluster.processes={cluster.processes}: one process a GPU, and {len(gpus)} GPU(s) were found")


def chosen_gpus(cluster: ClusterConfig) -> list[str]:
    """The GPUs that the runs of a plan share, by their identifiers; none on CPU.

    Raises:
        UserError: when ``cluster.devices`` names one that isn't there.
    """
    return _chosen_gpus(cluster) if cluster.device == "cuda" else []


def worker_environment(cluster: ClusterConfig, gpus: list[str], parallel: int) -> dict[str, str]:
    """Environment variables that give a run its ``gpus``, and its part of the cores that ``parallel`` runs share."""
    cores = len(os.sched_getaffinity(0)) // parallel
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} | thread_environment(cluster.threads, cluster.processes or 1, cores)


def thread_environment(threads: int | None, processes: int, cores: int) -> dict[str, str]:
    """The same for threads alone: ``threads`` a process, or the ``cores`` divided over ``processes``."""
    threads = threads or max(1, cores // processes)
    # Threads that wait by spinning make a step several times slower where something else runs on the same cores.
    waiting = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": waiting}


def _chosen_gpus(cluster: ClusterConfig) -> list[str]:
    visible = _visible_gpus()
    if cluster.devices is None:
        return visible
    missing = [index for index in cluster.devices if not 0 <= index < len(visible)]
    if missing:
        raise UserError(f"cluster.devices={cluster.devices}: {len(visible)} GPU(s) found here, numbered from 0")
    return [visible[index] for index in cluster.devices]


def _visible_gpus() -> list[str]:
    """Identifiers fit for CUDA_VISIBLE_DEVICES: what it names already, else every GPU of the machine."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    return _gpus_of_the_machine()


@functools.cache  # a grid asks once for each of its runs
def _gpus_of_the_machine() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    lines = [line for line in listing.stdout.splitlines() if line.startswith("GPU ")]
    return [str(index) for index in range(len(lines))] if listing.returncode == 0 else []
