"""``cluster=slurm`` without a cluster: sbatch's script, keys, the copied code, states."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, configuration

from largebatch.config.checks import validate
from largebatch.config.schema import Config
from largebatch.errors import UserError
from largebatch.launch.devices import resolve_devices
from largebatch.launch.plan import PlannedRun
from largebatch.launch.slurm import arrays_of, sbatch_texts, submit_plan
from largebatch.launch.slurm_nodes import Place
from largebatch.launch.slurm_task import node_arguments
from largebatch.runs import provenance
from largebatch.runs.folder import RunFolder
from largebatch.runs.provenance import code_hash, copy_code
from largebatch.runs.slurm_queue import claim_by_slurm
from largebatch.runs.table import run_rows


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Hide SLURM's commands. Return a folder on PATH for the test's own commands."""
    commands = tmp_path / "bin"
    commands.mkdir()
    monkeypatch.setenv("PATH", f"{commands}:/bin")
    monkeypatch.setattr("shutil.which", lambda name: str(commands / name) if (commands / name).exists() else None)
    return commands


def for_slurm(*overrides: str) -> Config:
    config = configuration(*TINY, "cluster=slurm", *overrides)
    validate(config)
    resolve_devices(config)
    return config


def planned(config: Config, name: str) -> PlannedRun:
    return PlannedRun(config, RunFolder(Path(config.runs_dir) / name), "")


def test_sbatch_s_script_follows_from_the_keys(tmp_path: Path) -> None:
    config = for_slurm(
        f"runs_dir={tmp_path}/my runs", "cluster.partition=gpu", "cluster.account=lab", "cluster.qos=long",
        "cluster.constraint=a100", "cluster.nodes=2", "cluster.gpus_per_node=4", "cluster.cpus_per_node=32",
        "cluster.memory_gb=1.5", "cluster.time_limit=90", "cluster.signal_seconds=60", "cluster.array_parallelism=2",
        "cluster.setup=[module load cuda]", "+cluster.options={exclusive: true, mail-type: FAIL}",
    )  # fmt: skip
    (text,) = sbatch_texts([planned(config, name) for name in ("a", "b", "c")])
    folder, code = f"{tmp_path}/my runs/.slurm", tmp_path / "my runs" / ".code" / code_hash()
    logs = f"--output '{folder}/%A_%a_%t_log.out' --error '{folder}/%A_%a_%t_log.err'"
    assert text.splitlines() == [
        "#!/bin/bash",
        "",
        "# Parameters",
        "#SBATCH --account=lab",
        "#SBATCH --array=0-2%2",
        "#SBATCH --constraint=a100",
        "#SBATCH --cpus-per-task=32",
        f"#SBATCH --error='{folder}/%A_%a_0_log.err'",
        "#SBATCH --exclusive",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --job-name=largebatch",
        "#SBATCH --mail-type=FAIL",
        "#SBATCH --mem=1536M",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output='{folder}/%A_%a_0_log.out'",
        "#SBATCH --partition=gpu",
        "#SBATCH --qos=long",
        "#SBATCH --requeue",
        "#SBATCH --signal=USR2@60",
        "#SBATCH --time=90",
        "",
        "# setup",
        "module load cuda",
        f"export PYTHONPATH='{code}'${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1",
        "",
        "# command",
        "export SUBMITIT_EXECUTOR=slurm",
        f"srun --unbuffered {logs} --kill-on-bad-exit=1 --cpus-per-task=32 "
        f"{sys.executable} -u -m submitit.core._submit '{folder}'",
    ]


def test_processes_are_one_a_gpu_by_default() -> None:
    for overrides, processes, device in (
        ((), 1, "cpu"),
        (("cluster.nodes=2", "cluster.gpus_per_node=4"), 8, "cuda"),
        (("cluster.nodes=2", "cluster.gpus_per_node=4", "cluster.processes_per_node=2"), 4, "cuda"),
        (("cluster.gpus_per_node=2", "cluster.device=cpu"), 1, "cpu"),
        (("cluster.nodes=2", "cluster.processes=4"), 4, "cpu"),
    ):
        cluster = for_slurm(*overrides).cluster
        assert (cluster.processes, cluster.device) == (processes, device), overrides


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("cluster=local", "cluster.partition=gpu"), "cluster.partition=gpu: only cluster=slurm has this key"),
        (("cluster=local", "cluster.nodes=2"), "cluster.nodes=2: only cluster=slurm has this key"),
        (("cluster=local", "cluster.setup=[true]"), "cluster.setup=.*: only cluster=slurm has this key"),
        (
            ("cluster.parallel=2",),
            "cluster.parallel=2: only cluster=local has this key. Fix: set cluster.array_parallelism",
        ),
        (("cluster.devices=[0]",), "cluster.devices=.*: only cluster=local has this key"),
        (("cluster.processes=3", "cluster.nodes=2"), "cluster.processes=3: must be cluster.nodes=2 times"),
        (("cluster.time_limit=1",), "cluster.signal_seconds=120: must be shorter than cluster.time_limit=1"),
        (("cluster.memory_gb=0",), "cluster.memory_gb=0"),
        (("cluster.device=cuda",), "cluster.device=cuda: the job requests no GPU. Fix: set cluster.gpus_per_node"),
        (
            ("cluster.gpus_per_node=2", "cluster.processes_per_node=4"),
            "cluster.processes_per_node=4: needs a GPU each",
        ),
        (("cluster.nodes=3",), "batch_size=16: can't be divided over 3 processes"),
    ],
)
def test_invalid_keys_are_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        for_slurm(*overrides)


def test_each_request_has_arrays_of_at_most_the_allowed_size() -> None:
    small, large = for_slurm(), for_slurm("cluster.memory_gb=64")
    plan = [planned(small if number % 2 else large, str(number)) for number in range(10)]
    arrays = arrays_of(plan, 3)
    assert [[run.folder.name for run in array] for array in arrays] == [
        ["0", "2", "4"], ["6", "8"], ["1", "3", "5"], ["7", "9"],
    ]  # fmt: skip
    assert [array[0].config.cluster.memory_gb for array in arrays] == [64, 64, None, None]


def test_without_sbatch_no_folder_is_made(tmp_path: Path) -> None:
    plan = [planned(for_slurm(f"runs_dir={tmp_path}/runs"), "a")]
    with pytest.raises(UserError, match=r"no sbatch here\. Fix: run this on a login node"):
        submit_plan(plan)
    assert not (tmp_path / "runs").exists()


def test_nodes_meet_on_the_first_node_at_the_job_s_port() -> None:
    cluster = for_slurm("cluster.nodes=2", "cluster.processes_per_node=2").cluster
    first, second = (node_arguments(cluster, Place(f"7_{n}", 1, ["node1", "node2"], 3)) for n in (0, 1))
    assert "--nnodes=2" in first
    assert "--nproc-per-node=2" in first
    assert "--rdzv-id=7_0_3" in first
    endpoints = {argument for argument in first + second if argument.startswith("--rdzv-endpoint=node1:")}
    assert len(endpoints) == 2
    on_one_node = node_arguments(for_slurm("cluster.processes=2").cluster, Place("7", 0, ["node1"], 0))
    assert "--rdzv-endpoint=127.0.0.1:0" in on_one_node
    assert node_arguments(for_slurm().cluster, Place("7", 0, ["node1"], 0)) == []


def test_the_copied_code_is_the_whole_package(tmp_path: Path) -> None:
    copy = copy_code(tmp_path)
    code = "import largebatch.launch.slurm_task as task; print(task.__file__)"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env={"PYTHONPATH": str(copy)}, capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(copy / "largebatch" / "launch" / "slurm_task.py")
    assert (copy / "largebatch" / "training" / "worker.py").exists()


def test_the_copied_code_is_named_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "largebatch"
    (package / "optim").mkdir(parents=True)
    (package / "__init__.py").write_text("here = True\n")
    (package / "optim" / "fast.cpp").write_text("int one = 1;\n")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "old.pyc").touch()
    monkeypatch.setattr(provenance, "PACKAGE", package)
    copies = []
    for content in ("int one = 1;\n", "int one = 2;\n", "int one = 1;\n"):
        (package / "optim" / "fast.cpp").write_text(content)
        provenance.code_hash.cache_clear()
        copies.append(copy_code(tmp_path / "code"))
        assert (copies[-1] / "largebatch" / "optim" / "fast.cpp").read_text() == content
    provenance.code_hash.cache_clear()
    assert copies[0] == copies[2] != copies[1]
    files = sorted(str(file.relative_to(copies[0])) for file in copies[0].rglob("*") if file.is_file())
    assert files == ["git.json", "largebatch/__init__.py", "largebatch/optim/fast.cpp"]
    assert {path.name for path in (tmp_path / "code").iterdir()} == {copy.name for copy in copies}


def fake_squeue(commands: Path, *lines: str) -> Path:
    """Make a ``squeue`` that prints ``lines``. Return the file that counts its calls."""
    calls = commands / "calls"
    text = "\n".join(("#!/bin/sh", f"echo called >>{calls}", *(f"echo '{line}'" for line in lines)))
    (commands / "squeue").write_text(text + "\n")
    (commands / "squeue").chmod(0o755)
    return calls


def test_rows_are_joined_with_slurm_s_states_in_one_call(tmp_path: Path, no_slurm: Path) -> None:
    calls = fake_squeue(
        no_slurm, "7_0|RUNNING|None", "7_1|PENDING|Resources", "7_2|TIMEOUT|TimeLimit", "7_3|CANCELLED|None",
        "7_4|COMPLETED|None", "7_5|PENDING|BeginTime",
    )  # fmt: skip
    expected = {
        "running": "running", "queued": "queued", "running ": "failed", "queued ": "failed", "finished": "finished",
        "preempted": "queued", "preempted ": "preempted",
    }  # fmt: skip
    folders = []
    for number, state in enumerate(expected):
        folder = RunFolder(tmp_path / str(number))
        folder.path.mkdir()
        folder.update_status(state=state.strip(), cluster="slurm", job_id=f"7_{number}")
        folders.append(folder)
    rows = run_rows(folders)
    assert [row["state"] for row in rows] == list(expected.values())
    assert rows[1]["message"] == "SLURM: Resources"
    assert rows[2]["message"].startswith("SLURM ended job 7_2: TIMEOUT (TimeLimit); the same command resumes")
    assert calls.read_text() == "called\n"


def test_a_run_in_submission_is_left_alone_until_its_launcher_must_be_dead(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.update_status(state="queued", cluster="slurm")
    assert claim_by_slurm(folder.read_status()) == "is being submitted to SLURM by another launcher"
    for updated in (0, time.time() + 1e6):  # long ago, or before the clock was set back
        folder.status.write_text(json.dumps(folder.read_status() | {"updated": updated}))
        assert claim_by_slurm(folder.read_status()) == ""
