"""``cluster=slurm`` without a cluster: sbatch's script, keys, the copied code, states."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY, configuration
from omegaconf import OmegaConf

from largebatch.config.checks import validate
from largebatch.config.schema import Config
from largebatch.config.typed import load_config, to_yaml
from largebatch.errors import UserError
from largebatch.launch.devices import in_words, resolve_devices
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


@functools.cache
def composed() -> Config:
    return configuration(*TINY, "cluster=slurm")


def requesting(**keys: Any) -> Config:
    """Return a checked configuration with these keys of ``cluster``, as ``for_slurm`` does, without Hydra's second."""
    config = copy.deepcopy(composed())
    schema = OmegaConf.structured(type(config.cluster))
    config.cluster = OmegaConf.to_object(OmegaConf.merge(schema, {"name": "slurm"} | keys))
    validate(config)
    resolve_devices(config)
    return config


def script(config: Config) -> str:
    (text,) = sbatch_texts([planned(config, "a")])
    return text


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
        (("cluster.gpus_per_node=0",), 1, "cpu"),
        (("+cluster.options.gres=license:2",), 1, "cpu"),
    ):
        cluster = for_slurm(*overrides).cluster
        assert (cluster.processes, cluster.device) == (processes, device), overrides


def options_of(text: str) -> list[str]:
    """Return the options of a script's #SBATCH lines."""
    return [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]


# Requests for four GPUs on each of two nodes. `gpus` counts those of the whole job.
SPELLINGS = [
    *(({"gpus_per_node": value}, 4) for value in (4, "4", "a100:4", "a100:2,v100:2")),
    *(({"options": {key: value}}, 4)
      for key in ("gpus-per-node", "gpus_per_node", "gpus-per-task", "gpus_per_task")
      for value in (4, "a100:4", "nvidia_a100_3g.20gb:4", "a100:2,v100:2")),
    *(({"options": {"gpus": value}}, 4) for value in (8, "a100:8", "a100:4,v100:4")),
    *(({"options": {"gres": value}}, 4) for value in (
        "gpu:4", "gpu:a100:4", "GPU:4", "gpu=4", "gres/gpu:4", "license:1,gpu:4", "gpu:a100:4,license:1",
        "license,gpu:a100:2,gpu:v100:2", "gpu,gpu:a100:3", "gpu:a100,gpu:3",
    )),
    *(({"options": {"gres": value}}, 1) for value in ("gpu", "gpu:a100", "shard:2", "mps:50")),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "number"), SPELLINGS)
def test_every_request_for_gpus_trains_on_all_of_them(keys: dict[str, Any], number: int) -> None:
    config = requesting(nodes=2, **keys)
    assert (config.cluster.device, config.cluster.processes_per_node) == ("cuda", number)
    asked = [option for option in options_of(script(config)) if option.startswith("g")]
    value = str(keys.get("gpus_per_node") or next(iter(keys["options"].values())))
    if "gres" in keys.get("options", {}):
        assert asked == [f"gres={value}"]
    else:
        halves = {"8": "4", "a100:8": "a100:4", "a100:4,v100:4": "a100:2,v100:2"}
        assert asked == [f"gpus-per-node={halves.get(value, value)}"]


@pytest.mark.parametrize("option", ["gres", "gpus", "gpus-per-node", "gpus-per-task"])
def test_no_beginning_and_no_second_request_for_gpus_is_overlooked(option: str) -> None:
    """SLURM completes the beginning of an option. Two requests contradict each other, or SLURM adds them."""
    value = "gpu:4" if option == "gres" else "4"
    for spelled in {option[:length] for length in range(1, len(option))} - {"gpus"}:
        with pytest.raises(UserError, match=f"options.{spelled}={value}: SLURM could complete it to "):
            requesting(options={spelled: value})
    for other in ("gres", "gpus", "gpus-per-node", "gpus-per-task"):
        if other != option:
            with pytest.raises(UserError, match="each sets the number of GPUs"):
                requesting(options={option: value, other: "gpu:4" if other == "gres" else "4"})
    with pytest.raises(UserError, match=f"cluster.gpus_per_node=4 and cluster.options.{option}={value}: each sets"):
        requesting(gpus_per_node=4, options={option: value})


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("gpus_per_node", ("a100:", "a100:x", -1, "a100:4:4", "1.5", " 4", "4,", "")),
        ("gpus", (True, "4,", "a100=x")),
        ("gres", ("gpu:4K", "gpu:a100:x", "gpu:a100:4(S:0)", "license:1,gpu:x:")),
    ],
)
def test_a_request_for_gpus_that_cannot_be_read_is_refused(option: str, values: tuple[Any, ...]) -> None:
    for value in values:
        keys = {"options": {option: value}} if option != "gpus_per_node" else {option: value}
        with pytest.raises(UserError, match=f"{option}={re.escape(str(value))}: unknown request for GPUs"):
            requesting(**keys)


def test_gpus_of_the_whole_job_are_divided_over_its_nodes() -> None:
    with pytest.raises(UserError, match=r"options.gpus=a100:3: can't be divided over cluster.nodes=2"):
        requesting(nodes=2, options={"gpus": "a100:3"})


def test_gpus_of_sbatch_s_environment_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_GRES", "gpu:4")
    with pytest.raises(UserError, match=r"SBATCH_GRES=gpu:4: .* Fix: unset it, set cluster.gpus_per_node"):
        requesting()


def test_the_plan_tells_processes_devices_and_cpus() -> None:
    for config, words in (
        (requesting(), "1 node x 1 process on cpu"),
        (
            requesting(nodes=2, gpus_per_node=4, cpus_per_node=32),
            "2 nodes x 4 processes on cuda, 32 CPUs each; GPUs of a node: 4",
        ),
        (
            requesting(options={"gres": "gpu:a100:2"}, time_limit="1-12"),
            "1 node x 2 processes on cuda; GPUs of a node: a100:2; time limit 1-12",
        ),
        (
            requesting(gpus_per_node=4, processes_per_node=2),
            "1 node x 2 processes on cuda; GPUs of a node: 4, 2 of them unused",
        ),
        (
            requesting(gpus_per_node="a100:2", device="cpu"),
            "1 node x 1 process on cpu; GPUs of a node: a100:2, 2 of them unused",
        ),
    ):
        assert in_words(config.cluster) == words


@pytest.mark.parametrize(
    ("time_limit", "minutes"),
    [
        ("240", 240), ("90:00", 90), ("0:30", 1), ("4:00:00", 240), ("04:00:01", 241), ("1-0", 1440), ("2-12", 3600),
        ("1-2:30", 1590), ("1-02:30:10", 1591), ("100:00:00", 6000),
    ],
)  # fmt: skip
def test_a_time_limit_has_slurm_s_forms(tmp_path: Path, time_limit: str, minutes: int) -> None:
    file = tmp_path / "preset.yaml"
    file.write_text(f"time_limit: {time_limit}\n")
    config = requesting(time_limit=OmegaConf.load(file).time_limit, signal_seconds=1)
    assert str(config.cluster.time_limit) == time_limit
    assert f"time={minutes}" in options_of(script(config))
    file.write_text(to_yaml(config))
    assert load_config(file).cluster == config.cluster
    assert yaml.load(file.read_text(), yaml.CSafeLoader)["cluster"]["time_limit"] == config.cluster.time_limit


def test_other_forms_of_a_time_limit_are_refused() -> None:
    for time_limit in (0, -5, "0:00", "4h", "1:60", "1:00:60", "1:60:00", "1-24", "1-1:60", "1:00:00:00", "", "1-"):
        allowed = "unknown time. Allowed: minutes, mm:ss, h:mm:ss, d-h"
        with pytest.raises(UserError, match=f"cluster.time_limit={time_limit}: {allowed}"):
            requesting(time_limit=time_limit)


def test_an_option_with_a_key_of_its_own_is_refused() -> None:
    for option, fix in {
        "nodes": "set cluster.nodes", "mem": "set cluster.memory_gb", "job-name": "set cluster.job_name",
        "job_name": "set cluster.job_name", "cpus_per_task": "set cluster.cpus_per_node", "array": "start a grid",
        "ntasks-per-node": "set cluster.processes_per_node", "gpus-per-socket": "set cluster.gpus_per_node",
        "time": "set cluster.time_limit", "part": "write the option in full", "quiet": "leave it out",
        "tres-per-task": "set cluster.gpus_per_node",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=f"cluster.options.{option}=2: .*Fix: {fix}"):
            requesting(options={option: 2})


def test_the_script_has_no_option_twice() -> None:
    options = {
        "exclusive": True, "gpus_per_task": "a100:2", "requeue": False, "mail_type": "END", "nice": 0, "comment": None,
    }  # fmt: skip
    found = options_of(script(requesting(options=options, job_name="mine", time_limit=5)))
    names = [option.partition("=")[0] for option in found]
    assert len(set(names)) == len(names)
    assert {"exclusive", "gpus-per-node=a100:2", "mail-type=END", "nice=0", "job-name=mine"} <= {*found}
    assert not {"requeue", "comment"} & {*names}
    with pytest.raises(UserError, match=r"cluster.options has mail-type twice"):
        requesting(options={"mail-type": "FAIL", "mail_type": "END"})


def test_srun_and_python_have_the_given_arguments() -> None:
    container = "apptainer exec --nv 'my image.sif' python3"
    mounts = ["--container-image=nvcr.io#pytorch", "--container-mounts=/a:/a"]
    config = requesting(python=container, cpu_bind="cores", cpus_per_node=8, srun_args=mounts)
    command, folder = script(config).splitlines()[-1], RunFolder(config.runs_dir + "/a").slurm
    assert command.endswith(
        " --kill-on-bad-exit=1 --cpus-per-task=8 --cpu-bind=cores '--container-image=nvcr.io#pytorch' "
        f"--container-mounts=/a:/a {container} -u -m submitit.core._submit {folder}"
    )
    other = requesting(cpu_bind="cores", cpus_per_node=8, srun_args=mounts)
    assert len(arrays_of([planned(config, "a"), planned(other, "b")], 10)) == 2


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("srun_args", ["-n4"], "cluster.srun_args=-n4: invalid"),
        ("srun_args", ["--gres=none"], "cluster.srun_args=--gres=none: .*set cluster.gpus_per_node"),
        ("srun_args", ["--cpu-b=none"], "SLURM could complete it to cpu-bind"),
        ("srun_args", ["--export=ALL", "--export=NONE"], "cluster.srun_args has export twice"),
        ("srun_args", ["--a=b\x1fc"], "cluster.srun_args=.*control character"),
        ("cpu_bind", "rank", "cluster.cpu_bind=rank: unknown. Allowed: none, sockets, cores"),
        ("setup", ["#SBATCH --gres=gpu:4"], "cluster.setup=.*sbatch would read it as an option"),
        ("job_name", "a\nb", "cluster.job_name=.*control character"),
        ("python", "a\x85b", "cluster.python=.*control character"),
    ],
)
def test_arguments_that_would_change_the_script_are_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        requesting(**{key: value})


def test_an_array_has_the_name_of_its_sweep() -> None:
    runs = [dataclasses.replace(planned(requesting(), name), sweep="large batch\nsteps") for name in ("a", "b")]
    assert "job-name=large_batch_steps" in options_of(*sbatch_texts(runs))
    assert "job-name=a" in options_of(*sbatch_texts(runs[:1]))
    named = [dataclasses.replace(run, config=requesting(job_name="mine")) for run in runs]
    assert "job-name=mine" in options_of(*sbatch_texts(named))


def test_numa_binding_is_torchrun_s_own(no_slurm: Path) -> None:
    with pytest.raises(UserError, match=r"cluster.numa_binding=node: .* the run is on CPU"):
        requesting(numa_binding="node")
    with pytest.raises(UserError, match=r"cluster.numa_binding=node: needs numactl, which isn't on PATH here"):
        requesting(numa_binding="node", gpus_per_node=2)
    (no_slurm / "numactl").touch(mode=0o755)
    for gpus in (1, 2):
        cluster = requesting(numa_binding="exclusive", gpus_per_node=gpus).cluster
        arguments = node_arguments(cluster, Place("7", 0, ["node1"], 0))
        assert arguments[:2] == ["-m", "torch.distributed.run"]
        assert {f"--nproc-per-node={gpus}", "--numa-binding=exclusive"} <= {*arguments}


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
