"""``cluster=slurm`` on a real cluster: jobs and arrays, several nodes, signals, requeues, and failures."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY, environment
from private_slurm.cluster import Cluster
from private_slurm.processes import wait_until
from runs import finish, is_alive, parameters, timeless, train_in
from wheel import with_packages

from largebatch.runs.metrics import read_rows
from slurm.conftest import place

ON_SLURM = ("cluster=slurm", "cluster.threads=1", "cluster.memory_gb=1")
LONG = (*TINY, "epochs=100", "eval_every=50", "checkpoint.every_seconds=0.2")  # some seconds of steps
Submit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path) -> Submit:
    """Return a function that runs ``python launch.py`` for a cluster in an empty folder, from any checkout."""

    usual = cluster

    def run(*overrides: str, root: Path = ROOT, cluster: Cluster = usual) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(root / "launch.py"), *ON_SLURM, *overrides],
            cwd=tmp_path,
            env=environment() | cluster.environment | {"PYTHONPATH": str(root / "src")},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the long run on this machine, without interruption."""
    return train_in(tmp_path_factory.mktemp("undisturbed") / "here", *LONG, "cluster.threads=1")


PAIR = (*LONG, "epochs=40", "eval_every=20")  # shorter, because two processes take longer


@pytest.fixture(scope="module")
def undisturbed_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(tmp_path_factory.mktemp("undisturbed") / "here", *PAIR, "cluster.threads=1", "cluster.processes=2")


def status(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "status.json").read_text())
    return found


def job_of(run: Path) -> str:
    return str(status(run)["job_id"])


def the_run_of_a_job(folder: Path) -> Path:
    (run,) = (folder / "runs").glob("synthetic-*")
    return run


def wait_for_state(run: Path, state: str, seconds: float = 120) -> None:
    assert wait_until(lambda: status(run)["state"] == state, seconds), describe(run)


def wait_for_step(run: Path, step: int, seconds: float = 90) -> None:
    def reached() -> bool:
        rows = read_rows(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
        return bool(rows) and rows[-1]["step"] >= step

    assert wait_until(reached, seconds), describe(run)


def describe(run: Path) -> str:
    logs = [*run.glob("log.txt"), *sorted((run.parent / ".slurm").glob("*_log.*"))]
    return "\n".join([str(status(run)), *(f"{log}:\n{log.read_text()[-2000:]}" for log in logs)])


def rows_as_listed(cluster: Cluster, folder: Path) -> list[dict[str, Any]]:
    result = subprocess.run(
        [sys.executable, "-m", "largebatch.cli", "status", str(folder / "runs"), "--json"],
        env=environment() | cluster.environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    return rows


def assert_same(run: Path, reference: Path) -> None:
    for name, value in parameters(reference).items():
        assert value.equal(parameters(run)[name]), name
    assert timeless(run) == timeless(reference)


def test_a_run_is_a_job_and_its_command_returns_at_once(submit: Submit, cluster: Cluster, tmp_path: Path) -> None:
    result = submit(*TINY, "epochs=1")
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / next(line.split()[1] for line in result.stdout.splitlines() if "as job" in line)
    assert f"scancel {job_of(run)}" in result.stdout
    assert re.search("is in SLURM's queue already|works on this run", submit(*TINY, "epochs=1").stdout)
    wait_for_state(run, "finished")
    assert status(run)["node"] in ("node1", "node2")
    assert (tmp_path / "runs" / ".code" / status(run)["code"] / "largebatch" / "training" / "worker.py").exists()
    again = submit(*TINY, "epochs=1")
    assert again.returncode == 0
    assert "finished before; not repeated" in again.stdout
    assert "nothing to submit" in again.stdout


def test_a_job_runs_the_own_classes_of_its_submission(submit: Submit, cluster: Cluster, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples" / "mylab", tmp_path / "mylab")
    own = ("optimizer=custom", "optimizer.target=mylab.optimizer:SignMomentum")
    result = submit(*TINY, "epochs=1", *own, "cluster.options={hold: true}")
    assert result.returncode == 0, result.stderr
    run = the_run_of_a_job(tmp_path)
    (tmp_path / "mylab" / "optimizer.py").write_text("raise SystemExit('changed')\n")
    release = ["scontrol", "release", job_of(run)]
    subprocess.run(release, env=environment() | cluster.environment, capture_output=True, check=True)
    wait_for_state(run, "finished")
    assert "SignMomentum: lr 0.003" in (run / "log.txt").read_text()


def test_a_grid_is_one_array_and_can_be_watched_to_its_end(submit: Submit, tmp_path: Path) -> None:
    result = submit("-m", *TINY, "epochs=1", "seed=0,1,2,3", "cluster.array_parallelism=2", "cluster.wait=true")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 runs as array" in result.stdout
    assert "at most 2 at a time" in result.stdout
    found = [status(run) for run in (tmp_path / "runs").glob("synthetic-*")]
    assert [one["state"] for one in found] == ["finished"] * 4
    (array,) = {one["job_id"].partition("_")[0] for one in found}
    assert sorted(one["job_id"] for one in found) == [f"{array}_{number}" for number in range(4)]
    spans = [(one["started"], one["ended"]) for one in found]
    assert max(sum(begin <= moment < end for begin, end in spans) for moment, _ in spans) <= 2


def test_two_nodes_of_two_processes_train_the_same_as_one_process(submit: Submit, tmp_path: Path) -> None:
    alone = train_in(tmp_path / "alone", *TINY, "epochs=2")
    assert submit(*TINY, "epochs=2", "cluster.nodes=2", "cluster.processes_per_node=2").returncode == 0
    run = the_run_of_a_job(tmp_path)
    wait_for_state(run, "finished")
    assert status(run)["node"] == "node1,node2"
    for name, value in parameters(alone).items():
        assert (parameters(run)[name] - value).abs().max() < 1e-5, name


@pytest.mark.parametrize("mode", ["clf", "bt"])
def test_a_deterministic_run_of_a_job_equals_one_of_this_machine_bit_for_bit(
    submit: Submit, tmp_path: Path, mode: str
) -> None:
    options = (*TINY, f"mode={mode}", "steps=12", "cluster.threads=1", "deterministic=true")
    here = train_in(tmp_path / "here", *options, "cluster.processes=2")
    assert submit(*options, "cluster.processes_per_node=2").returncode == 0
    run = the_run_of_a_job(tmp_path)
    wait_for_state(run, "finished")
    assert run.name == here.name
    assert_same(run, here)
    first, second = (json.loads((each / "summary.json").read_text()) for each in (here, run))
    assert first["checksum"] == second["checksum"]


def test_a_stopped_rank_of_a_job_is_named_and_the_job_ends(submit: Submit, cluster: Cluster, tmp_path: Path) -> None:
    assert submit(*LONG, "cluster.processes_per_node=2", "cluster.hang_seconds=5").returncode == 0
    run = the_run_of_a_job(tmp_path)
    wait_for_step(run, 2)
    first = status(run)["pid"]
    torchrun = Path(f"/proc/{first}/stat").read_text().rpartition(")")[2].split()[1]
    ranks = [int(pid) for pid in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()]
    (second,) = {*ranks} - {first}
    os.kill(second, signal.SIGSTOP)
    wait_for_state(run, "failed")
    assert f"{status(run)['node']} rank 1 gave no sign of life for 5 s: stopped or frozen" in status(run)["message"]
    assert wait_until(lambda: cluster.run("squeue", "--noheader").stdout == "", 30)
    assert not any(map(is_alive, ranks))


# A file on the path of imports that each Python reads first: it notes what a process sees.
NOTES = """
import json, os, pathlib, sys
if "{only}" in os.environ:
    rank = os.environ.get("RANK", "0")
    seen = {{"python": sys.executable, "argv": sys.orig_argv}} | dict(os.environ)
    half = pathlib.Path(r"{folder}", f"{{os.getpid()}}.half")
    half.write_text(json.dumps(seen))
    half.replace(half.with_name(f"{{rank}}.json"))  # a reader never sees half a file
"""


def notes_of_processes(tmp_path: Path, only: str) -> tuple[str, Callable[[], list[dict[str, Any]]]]:
    """Return a key that has each Python with the variable ``only`` note what it sees, and a reader of the notes."""
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(NOTES.format(only=only, folder=folder))

    def read() -> list[dict[str, Any]]:
        return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]

    return f"cluster.setup=['export PYTHONPATH={folder}']", read


@pytest.mark.parametrize(
    "request_for_gpus",
    ["cluster.gpus_per_node=a100:2", "+cluster.options.gres=gpu:a100:2", "+cluster.options.gpus=a100:4"],
)
def test_each_rank_of_two_nodes_sees_its_node_s_gpus(submit: Submit, tmp_path: Path, request_for_gpus: str) -> None:
    noting, noted = notes_of_processes(tmp_path, "LOCAL_RANK")
    shown = submit(*TINY, "cluster.nodes=2", request_for_gpus, "cluster.cpus_per_node=2", "dry_run=true")
    assert "2 nodes x 2 processes on cuda, 2 CPUs each" in shown.stdout, shown.stderr
    result = submit(*TINY, "cluster.nodes=2", request_for_gpus, "cluster.cpus_per_node=2", noting)
    assert "2 nodes x 2 processes on cuda, 2 CPUs each" in result.stdout, result.stderr
    run = the_run_of_a_job(tmp_path)
    assert wait_until(lambda: len(noted()) == 4, 60), describe(run)
    for rank, seen in enumerate(noted()):
        assert seen["CUDA_VISIBLE_DEVICES"] == seen["SLURM_STEP_GPUS"] == "0,1"
        assert (seen["LOCAL_RANK"], seen["SLURM_NODEID"]) == (str(rank % 2), str(rank // 2))
    wait_for_state(run, "failed")  # the GPUs are fake


def test_a_wrapper_starts_the_task_and_its_ranks(submit: Submit, cluster: Cluster, tmp_path: Path) -> None:
    """A wrapper in place of a container: it has another interpreter, and needs srun's own options."""
    noting, noted = notes_of_processes(tmp_path, "LOCAL_RANK")
    inside = tmp_path / "container"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", inside], check=True)
    wrapper = tmp_path / "wrapper"
    site = Path(pytest.__file__).parent.parent
    wrapper.write_text(
        f'#!/bin/sh\n[ "$1" = exec ] || exit 3\nexport INSIDE=yes PYTHONPATH="$PYTHONPATH:{site}"\n'
        f'shift\nexec {inside}/bin/"$@"\n'
    )
    wrapper.chmod(0o755)
    container = (f"cluster.python='{wrapper} exec python3'", "cluster.srun_args=['--job-name=step']")
    result = submit(
        *TINY, "epochs=1", "cluster.processes_per_node=2", "cluster.job_name=mine", "cluster.cpu_bind=cores", noting,
        *container, "+cluster.options.comment=two words",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    run = the_run_of_a_job(tmp_path)
    named = cluster.run("squeue", "--noheader", "--states=all", "--format=%j", f"--jobs={job_of(run)}")
    assert named.stdout == "mine\n"
    wait_for_state(run, "finished")
    assert [(seen["INSIDE"], seen["python"]) for seen in noted()] == [("yes", f"{inside}/bin/python3")] * 2


@pytest.mark.parametrize("name", ["USR2", "TERM"])
def test_a_signalled_run_is_requeued_and_equals_an_undisturbed_run(
    submit: Submit, cluster: Cluster, tmp_path: Path, undisturbed: Path, name: str
) -> None:
    assert submit(*LONG).returncode == 0
    run = the_run_of_a_job(tmp_path)
    wait_for_step(run, 20)
    assert cluster.run("scancel", f"--signal={name}", job_of(run)).returncode == 0
    assert wait_until(lambda: status(run)["state"] == "preempted", 20), describe(run)
    stopped_after = status(run)["step"]
    assert stopped_after < 400
    assert wait_until(lambda: status(run)["message"] == "requeued, 1 of 100", 10), describe(run)
    wait_for_state(run, "finished")
    assert status(run)["restarts"] == 1
    assert f"resumed after step {stopped_after} of 400" in (run / "log.txt").read_text()
    assert_same(run, undisturbed)


def test_processes_under_torchrun_are_requeued_and_equal_an_undisturbed_run(
    submit: Submit, cluster: Cluster, tmp_path: Path, undisturbed_pair: Path
) -> None:
    assert submit(*PAIR, "cluster.nodes=2").returncode == 0
    run = the_run_of_a_job(tmp_path)
    wait_for_step(run, 6)
    cluster.run("scancel", "--signal=USR2", job_of(run))
    wait_for_state(run, "finished")
    assert status(run)["restarts"] == 1
    assert_same(run, undisturbed_pair)


def test_requeues_stop_at_the_limit(submit: Submit, cluster: Cluster, tmp_path: Path) -> None:
    assert submit(*LONG, "cluster.max_requeues=0").returncode == 0
    run = the_run_of_a_job(tmp_path)
    wait_for_step(run, 2)
    cluster.run("scancel", "--signal=USR2", job_of(run))
    wait_for_state(run, "preempted")
    assert wait_until(lambda: "max_requeues=0 is reached; the same command" in status(run)["message"], 10)


def test_the_same_command_resumes_a_run_whose_worker_was_killed(
    submit: Submit, cluster: Cluster, tmp_path: Path, undisturbed: Path
) -> None:
    submit(*LONG)
    run = the_run_of_a_job(tmp_path)
    wait_for_step(run, 20)
    os.kill(status(run)["pid"], signal.SIGKILL)
    wait_for_state(run, "failed")
    assert "was ended by SIGKILL (" in status(run)["message"]
    assert submit(*LONG).returncode == 0
    wait_for_state(run, "finished")
    assert_same(run, undisturbed)


def test_the_message_names_the_killed_worker_of_several(submit: Submit, tmp_path: Path) -> None:
    submit(*LONG, "cluster.nodes=2")
    run = the_run_of_a_job(tmp_path)
    wait_for_step(run, 2)
    os.kill(status(run)["pid"], signal.SIGKILL)
    expected = f"rank 0 on {status(run)['host']} was ended by SIGKILL ("
    assert wait_until(lambda: status(run)["message"].startswith(expected), 30), describe(run)
    assert status(run)["state"] == "failed"


def test_a_killed_job_is_shown_as_failed(submit: Submit, cluster: Cluster, tmp_path: Path) -> None:
    submit(*LONG)
    run = the_run_of_a_job(tmp_path)
    wait_for_step(run, 2)
    task = int(Path(f"/proc/{status(run)['pid']}/stat").read_text().split()[3])
    os.kill(task, signal.SIGKILL)  # as when memory runs out: no process is left to write the status

    def shown() -> str:
        (row,) = rows_as_listed(cluster, tmp_path)
        return f"{row['state']}: {row['message']}"

    assert wait_until(lambda: shown().startswith(f"failed: SLURM ended job {job_of(run)}: "), 30), shown()


def test_a_run_of_a_lost_node_resumes_on_another_node(
    submit: Submit, cluster: Cluster, tmp_path: Path, undisturbed: Path
) -> None:
    submit(*LONG)
    run = the_run_of_a_job(tmp_path)
    wait_for_step(run, 20)
    node = status(run)["node"]
    cluster.kill_node(node)
    cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    try:
        wait_for_state(run, "finished")
    finally:
        cluster.start_node(node)
    assert status(run)["node"] != node
    assert_same(run, undisturbed)


@pytest.mark.parametrize("noticed_by", ["workers", "SLURM"])
def test_a_run_that_lost_one_of_its_nodes_resumes(
    submit: Submit, cluster: Cluster, tmp_path: Path, undisturbed_pair: Path, noticed_by: str
) -> None:
    assert submit(*PAIR, "checkpoint.every_steps=10", "cluster.nodes=2").returncode == 0
    run = the_run_of_a_job(tmp_path)
    wait_for_step(run, 20)
    cluster.kill_node("node2", jobs=noticed_by == "workers")  # else only its daemon, and its worker continues
    try:
        if noticed_by == "SLURM":
            cluster.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
        else:
            waits = "node2: lost; waiting for SLURM to requeue the job"
            assert wait_until(lambda: status(run)["message"] == waits, 60), describe(run)
        assert wait_until(lambda: cluster.node_states()["node2"].startswith("down"), 90), describe(run)
    finally:
        cluster.start_node("node2")
    wait_for_state(run, "finished")
    assert status(run)["restarts"] == 1
    assert_same(run, undisturbed_pair)


def test_edits_while_a_run_is_queued_do_not_affect_it(submit: Submit, cluster: Cluster, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in ("conf", "sweeps", "src"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "launch.py", checkout)
    assert submit(*TINY, "epochs=1", "+cluster.options.hold=true", root=checkout).returncode == 0
    run = the_run_of_a_job(tmp_path)
    for file in (checkout / "src").rglob("*.py"):
        file.write_text("raise SystemExit('edited')\n")
    cluster.run("scontrol", "release", job_of(run))
    wait_for_state(run, "finished")


def test_an_installed_package_runs_its_own_code_in_a_job(installed: Path, cluster: Cluster, tmp_path: Path) -> None:
    env = with_packages(installed, base=environment() | cluster.environment)
    command = [str(installed / "bin" / "largebatch"), "run", *ON_SLURM, *TINY, "epochs=1"]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    run = the_run_of_a_job(tmp_path)
    wait_for_state(run, "finished")
    assert sorted(path.name for path in (tmp_path / "runs" / ".code").iterdir()) == [status(run)["code"]]


@pytest.mark.parametrize("grid", [("seed=0",), ("-m", "seed=0,1")])
def test_a_wrong_partition_is_an_error_in_slurm_s_words(submit: Submit, tmp_path: Path, grid: tuple[str]) -> None:
    result = submit(*TINY, *grid, "cluster.partition=none")
    assert result.returncode == 2
    assert "invalid partition specified: none" in result.stderr
    assert all(line.startswith("error: ") for line in result.stderr.splitlines()), result.stderr
    assert list((tmp_path / "runs").glob("synthetic-*")) == []


def largebatch(cluster: Cluster, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "largebatch.cli", *arguments],
        cwd=folder, env=environment() | cluster.environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_cancelled_runs_are_saved_and_shown_as_preempted(submit: Submit, cluster: Cluster, tmp_path: Path) -> None:
    submit("-m", *LONG, "seed=0,1", "cluster.array_parallelism=1")
    first, second = sorted((tmp_path / "runs").glob("synthetic-*"), key=lambda run: job_of(run))
    wait_for_step(first, 2)
    result = largebatch(cluster, tmp_path, "cancel", "runs")
    assert result.returncode == 0, result.stderr
    assert f"{first.name}: cancelled after step {status(first)['step']} of 400" in result.stdout
    assert f"{second.name}: cancelled before it started" in result.stdout
    assert [row["state"] for row in rows_as_listed(cluster, tmp_path)] == ["preempted"] * 2
    assert cluster.run("squeue", "--noheader", f"--jobs={job_of(first)},{job_of(second)}").stdout == ""


def test_a_node_without_scontrol_tells_the_user_to_resume(submit: Submit, cluster: Cluster, tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("bash", "env", "srun", "python3"):
        (commands / name).symlink_to(shutil.which(name) or name)
    submit(*LONG, f"cluster.setup=['export PATH={commands}']")
    run = the_run_of_a_job(tmp_path)
    wait_for_step(run, 2)
    cluster.run("scancel", "--signal=USR2", job_of(run))
    wait_for_state(run, "preempted")
    why = f"{status(run)['node']} has no scontrol to requeue the job with; the same command resumes"
    assert wait_until(lambda: status(run)["message"].startswith(why), 20), describe(run)


def test_a_full_queue_is_an_error_in_slurm_s_words(tmp_path: Path, submit: Submit) -> None:
    with place() as (folder, port), Cluster(folder, port=port, nodes=1, accounting=False, max_jobs=2) as cluster:
        assert submit(*TINY, "seed=0", "+cluster.options.hold=true", cluster=cluster).returncode == 0
        result = submit("-m", *TINY, "seed=1,2", cluster=cluster)
    assert result.returncode == 2
    refusal, rest = result.stderr.splitlines()
    assert refusal == "error: SLURM refused 2 run(s): sbatch: error: Slurm temporarily unable to accept job"
    assert rest == "error: no run of this plan is in the queue"
    assert len(list((tmp_path / "runs").glob("synthetic-*"))) == 1


def test_a_refused_part_of_a_grid_leaves_nothing_in_the_queue(submit: Submit, cluster: Cluster, tmp_path: Path) -> None:
    cases = "cases=[{seed: 0, cluster.partition: high}, {seed: 1, cluster.partition: none}]"
    result = submit("-m", *TINY, cases, "+cluster.options.hold=true")
    assert result.returncode == 2, result.stdout
    assert "invalid partition specified: none" in result.stderr
    assert "no run of this plan is in the queue" in result.stderr
    assert wait_until(lambda: cluster.run("squeue", "--noheader").stdout == "", 10)
    run = the_run_of_a_job(tmp_path)  # of the first part, which was submitted and withdrawn
    assert status(run)["state"] == "failed"
    assert "not submitted: SLURM refused 1 run(s): sbatch: error: invalid partition" in status(run)["message"]


def test_a_grid_longer_than_the_site_allows_is_several_arrays(tmp_path: Path, submit: Submit) -> None:
    small = {"nodes": 1, "accounting": False, "max_array_size": 2}
    with place() as (folder, port), Cluster(folder, port=port, **small) as cluster:
        result = submit("-m", *TINY, "epochs=1", "seed=0,1,2", "cluster.wait=true", cluster=cluster)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 runs as array" in result.stdout
    assert "-s2-" in next(line for line in result.stdout.splitlines() if "as job" in line)
    assert [status(run)["state"] for run in (tmp_path / "runs").glob("synthetic-*")] == ["finished"] * 3


def test_a_run_of_a_job_can_be_resumed_on_this_machine(
    submit: Submit, cluster: Cluster, tmp_path: Path, undisturbed: Path
) -> None:
    submit(*LONG)
    run = the_run_of_a_job(tmp_path)
    wait_for_step(run, 20)
    cluster.run("scancel", job_of(run))
    listed = ("squeue", "--noheader", f"--jobs={job_of(run)}")
    assert wait_until(lambda: cluster.run(*listed).stdout == "", 30)
    command = [sys.executable, str(ROOT / "launch.py"), *LONG, "cluster.threads=1"]
    finish(
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment() | cluster.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    assert status(the_run_of_a_job(tmp_path))["cluster"] == "local"
    assert_same(run, undisturbed)
