"""The private cluster: real jobs on it, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from private_slurm import packages
from private_slurm.cluster import Cluster
from private_slurm.packages import ClusterError
from private_slurm.processes import wait_until

from slurm.conftest import place

# Two processes that ignore SIGTERM, one of them without a job's environment. Their sleeping time identifies them.
SLEEP = f"sleep\0{100_000 + os.getpid()}"
STUBBORN = "trap '' TERM\n{0} & env --ignore-environment {0} & wait".format(SLEEP.replace("\0", " "))


@pytest.fixture
def small(cluster: Cluster) -> Iterator[Cluster]:
    """Return another cluster, not started: one node, no accounting, arrays of at most 4."""
    with place() as (folder, port):
        small = Cluster(folder, nodes=1, accounting=False, port=port, max_array_size=4)
        yield small
        small.stop()


def submit(cluster: Cluster, folder: Path, script: str, *options: str) -> str:
    """Submit a job with output in ``folder/JOB.out``. Return its number."""
    file = folder / "job.sh"
    file.write_text(f"#!/bin/bash\n{script}\n")
    result = cluster.run("sbatch", "--parsable", f"--output={folder}/%j.out", "--open-mode=append", *options, str(file))
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def wait_for(cluster: Cluster, job: str, state: str, seconds: float = 60) -> None:
    def now() -> list[str]:
        listed = cluster.run("squeue", "--noheader", "--states=all", "--array", "--format=%T", f"--jobs={job}")
        return listed.stdout.split()

    assert wait_until(lambda: set(now()) == {state}, seconds), f"job {job} is {now()}"


def wait_for_output(file: Path, text: str) -> None:
    assert wait_until(lambda: file.exists() and text in file.read_text(), 20), f"no {text} in {file}"


def mentions(text: str) -> list[str]:
    """Return the other processes with ``text`` in their command line or environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found_text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if text.encode() in found_text and int(process.name) != os.getpid():
            found.append(f"{process.name}: {found_text[:200]!r}")
    return found


def test_all_nodes_accept_jobs(cluster: Cluster) -> None:
    assert wait_until(lambda: cluster.node_states() == {"node1": "idle", "node2": "idle"}, 20), cluster.node_states()


def test_each_node_has_its_own_hostname_that_resolves(cluster: Cluster) -> None:
    result = cluster.run("srun", "--nodes=2", "hostname")
    assert sorted(result.stdout.split()) == ["node1", "node2"], result.stderr
    assert [socket.gethostbyname(name) for name in ("node1", "node2")] == ["127.0.1.1", "127.0.1.2"]
    assert socket.gethostname() not in ("node1", "node2")


def test_an_array_runs_as_many_jobs_at_once_as_requested(cluster: Cluster, tmp_path: Path) -> None:
    script = f"cd {tmp_path}; date +%s.%N >from.$SLURM_ARRAY_TASK_ID; sleep 1; date +%s.%N >to.$SLURM_ARRAY_TASK_ID"
    job = submit(cluster, tmp_path, script, "--array=0-3%2")
    wait_for(cluster, job, "COMPLETED")
    times = [[float((tmp_path / f"{name}.{index}").read_text()) for name in ("from", "to")] for index in range(4)]
    assert max(sum(begin <= moment < end for begin, end in times) for moment, _ in times) == 2


def test_fake_gpus_are_allocated_up_to_their_number(cluster: Cluster) -> None:
    shown = cluster.run("srun", "--gpus-per-node=2", "printenv", "CUDA_VISIBLE_DEVICES")
    assert shown.stdout == "0,1\n", shown.stderr
    for request in ("--gpus-per-node=3", "--gpus-per-node=v100:1"):
        refused = cluster.run("srun", request, "true")
        assert refused.returncode != 0
        assert "Requested node configuration is not available" in refused.stderr


def test_accounting_has_a_job_s_end(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "exit 3")
    asked = ("sacct", "--noheader", "--parsable2", "--allocations", "--format=State,ExitCode", f"--jobs={job}")
    assert wait_until(lambda: cluster.run(*asked).stdout == "FAILED|3:0\n", 20), cluster.run(*asked)


def test_a_requeued_job_runs_again_under_its_number(cluster: Cluster, tmp_path: Path) -> None:
    script = 'echo "restarts: ${SLURM_RESTART_COUNT:-0}"; [ -n "$SLURM_RESTART_COUNT" ] || sleep 100'
    job = submit(cluster, tmp_path, script)
    wait_for_output(tmp_path / f"{job}.out", "restarts: 0")
    assert cluster.run("scontrol", "requeue", job).returncode == 0
    wait_for(cluster, job, "COMPLETED")
    printed = [line for line in (tmp_path / f"{job}.out").read_text().splitlines() if line.startswith("restarts")]
    assert printed == ["restarts: 0", "restarts: 1"]


def test_a_job_of_the_low_partition_is_signalled_and_preempted(cluster: Cluster, tmp_path: Path) -> None:
    patient = "trap 'echo got the signal; exit' USR2; touch ready; while true; do sleep 0.1; done"
    low = submit(
        cluster, tmp_path, f"cd {tmp_path}; {patient}",
        "--partition=low", "--nodes=2", "--exclusive", "--signal=B:USR2@60",
    )  # fmt: skip
    assert wait_until((tmp_path / "ready").exists, 20)
    high = submit(cluster, tmp_path, "true", "--nodes=2", "--exclusive")
    wait_for(cluster, high, "COMPLETED")
    assert (tmp_path / f"{low}.out").read_text() == "got the signal\n"


def test_jobs_of_a_lost_node_run_elsewhere(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, 'hostname; [ -n "$SLURM_RESTART_COUNT" ] || sleep 100', "--gpus-per-node=2")
    output = tmp_path / f"{job}.out"
    wait_for_output(output, "node")
    node = output.read_text().strip()
    cluster.kill_node(node)
    assert cluster.daemons()[node] is None
    cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    try:
        wait_for(cluster, job, "COMPLETED")
    finally:
        cluster.start_node(node)
    assert sorted(output.read_text().split()) == ["node1", "node2"]
    assert cluster.node_states() == {"node1": "idle", "node2": "idle"}


def test_a_second_start_leaves_a_running_cluster_alone(cluster: Cluster) -> None:
    before = cluster.daemons()
    assert not cluster.start()
    assert cluster.daemons() == before
    with pytest.raises(ClusterError, match=r"runs with other settings\. Fix: stop it first"):
        Cluster(cluster.state, port=cluster.settings.port, cpus=3).start()


def test_stopping_leaves_no_processes_and_no_names(small: Cluster, cluster: Cluster, tmp_path: Path) -> None:
    assert small.start()
    submit(small, tmp_path, STUBBORN)
    assert wait_until(lambda: len(mentions(SLEEP)) == 2, 10)
    small.stop()
    assert mentions(f"{small.state}/") + mentions(SLEEP) == []
    hosts = Path("/etc/hosts").read_text()
    assert str(small.state) not in hosts
    assert hosts.count(str(cluster.state)) == 2
    assert cluster.run("srun", "true").returncode == 0


def test_a_killed_cluster_starts_again(small: Cluster, tmp_path: Path) -> None:
    small.start()
    job = submit(small, tmp_path, STUBBORN)
    assert wait_until(lambda: len(mentions(SLEEP)) == 2, 10)
    for pid in small.daemons().values():
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    assert small.start()
    assert small.run("squeue", "--noheader").stdout == ""
    assert small.run("srun", "hostname").stdout == "node1\n"
    assert mentions(f"SLURM_JOB_ID={job}") + mentions(SLEEP) == []


def test_the_limit_on_array_sizes_can_be_set(small: Cluster, tmp_path: Path) -> None:
    small.start()
    submit(small, tmp_path, "true", "--array=0-3")
    refused = small.run("sbatch", "--array=0-4", str(tmp_path / "job.sh"))
    assert "Invalid job array specification" in refused.stderr


def test_mistakes_are_errors_of_one_line(tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cluster.state  # no cluster below writes to it
    (tmp_path / "notes.txt").touch()
    for state, settings, message in (
        (folder / "same-port", {"port": cluster.settings.port}, r"port \d+ is taken, perhaps by another cluster"),
        (folder / ("long" * 15), {}, "allowed: at most 60"),
        (folder / "two words", {}, "allowed: only letters, digits"),
        (folder / "no-nodes", {"nodes": 0}, "nodes=0: allowed: 1 to 99"),
        (Path("/usr"), {}, "not empty, and not a cluster's folder"),
    ):
        with pytest.raises(ClusterError, match=message):
            Cluster(state, **settings).start()
    monkeypatch.setattr(packages, "PATH", str(tmp_path))
    with pytest.raises(
        ClusterError, match=r"munge slurmctld .* missing\. Fix: run python .*private_slurm/cluster.py install"
    ):
        Cluster(folder / "new").start()


def test_the_status_command_lists_the_daemons(cluster: Cluster) -> None:
    command = [sys.executable, str(ROOT / "tests/tools/private_slurm/cluster.py"), "status", str(cluster.state)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(cluster.daemons())
