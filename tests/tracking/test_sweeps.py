"""W&B sweeps: a real agent runs the real program with a loopback server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, TINY, configuration, environment
from programs import Programs
from protocol import Recorded, TakenRun
from recorder import recorder
from wandb.apis.public.sweeps import _validate_config_and_fill_distribution
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from largebatch.config.checks import validate
from largebatch.config.identity import identity
from largebatch.launch.sweep_agent import overrides
from largebatch.runs.folder import RunFolder
from largebatch.runs.metrics import read_rows

Json = dict[str, Any]
KEY = "c0ffee" * 6 + "beef"
SWEEPS = sorted((ROOT / "sweeps" / "wandb").glob("*.yaml"))
RECORDED = [item for item in TINY if item != "tracker=none"]
COMMAND = [*RECORDED, "dataset.val_fraction=0.25", "epochs=3", "eval_every=1"]

# wandb's own command line, but it checks every 0.5 s instead of every 5 s if its run has ended.
WANDB = "from wandb.wandb_agent import Agent; Agent.POLL_INTERVAL = 0.5; from wandb.cli.cli import cli; cli()"


def under(server: Recorded, home: Path, **more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # of the sweep's program
    return {**environment(), **server.environment(KEY), "HOME": str(home), "PATH": path, **more}


def as_agent(server: Recorded, home: Path, run_id: str) -> dict[str, str]:
    """Return the environment that an agent gives its program."""
    return under(server, home, WANDB_SWEEP_ID="sweep1", WANDB_RUN_ID=run_id, WANDB_PROJECT="p", WANDB_ENTITY="team")


def given(**values: Any) -> Json:
    return {key.replace("__", "."): {"value": value} for key, value in values.items()}


# Agents.


def test_an_agent_runs_in_its_w_and_b_runs_and_does_not_repeat_a_finished_run(tmp_path: Path) -> None:
    sweep = {
        "program": "largebatch", "project": "p", "entity": "team", "method": "random",
        "metric": {"name": "val/accuracy", "goal": "maximize"},
        "parameters": {"optimizer.lr": {"min": 0.1, "max": 1.5}},
        "command": ["${env}", "${program}", "run", *COMMAND, "${args_no_hyphens}"],
    }  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    with recorder() as server:
        server.arguments = [
            given(optimizer__lr=0.5, optimizer__norm_clip=None),
            given(optimizer__lr=1e19),  # diverges
            given(optimizer__lr=0.5),  # the first again
        ]
        for command in (["sweep", "sweep.yaml"], ["agent", "team/p/sweep1"]):
            result = subprocess.run(
                [sys.executable, "-c", WANDB, *command], cwd=tmp_path, env=under(server, tmp_path), timeout=240,
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert result.returncode == 0, result.stdout + result.stderr
    assert server.unknown == []
    first, diverged, again = server.runs.values()
    assert list(server.runs) == sorted(name for name in server.runs if name.startswith("swept"))

    folders = {str(path): RunFolder(path) for path in (tmp_path / "runs").iterdir()}
    assert len(folders) == 2
    of_run = {folder.name: folder for folder in folders.values()}
    folder = of_run[first.config["resolved"]["run"]]
    assert folder.name.endswith(identity(configuration(*COMMAND, "optimizer.lr=0.5")))
    assert first.config["optimizer.lr"] == first.config["optimizer"]["lr"] == 0.5  # the W&B sweep's key, and ours
    rows = read_rows(folder.metrics)
    assert [row["epoch"] for row in of(first, "val/accuracy")] == [1, 2, 3]
    assert of(first, "val/accuracy") == [row for row in rows if "val/accuracy" in row]
    assert (first.exit_code, folder.state()) == (0, "finished")

    assert of(again, "val/accuracy") == of(first, "val/accuracy")
    assert again.summary["val/accuracy"] == first.summary["val/accuracy"]
    assert (again.exit_code, again.config["resolved"]) == (0, first.config["resolved"])
    assert result.stdout.count("logged the metrics of") == 1

    assert of_run[diverged.config["resolved"]["run"]].state() == "diverged"
    assert diverged.exit_code == 1  # so that the search doesn't take its best value before the divergence


def of(run: TakenRun, metric: str) -> list[Json]:
    return [row for row in run.rows() if metric in row]


def interrupted(arguments: list[str], number: int, cwd: Path, env: dict[str, str]) -> RunFolder:
    """Run until some rows are logged, then send a signal. Return the run folder."""
    command = [sys.executable, str(ROOT / "launch.py"), *arguments]
    process = subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = [path / "metrics.jsonl" for path in cwd.glob("runs/*")]
    before, until = len(read_rows(metrics[0])) if metrics else 0, time.monotonic() + 90
    while not any(len(read_rows(path)) > before + 4 for path in cwd.glob("runs/*/metrics.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(60) == -number
    (path,) = (cwd / "runs").iterdir()
    return RunFolder(path)


@pytest.mark.slow
def test_a_stopped_run_is_saved_and_resumed_with_its_whole_history(tmp_path: Path) -> None:
    """An agent sends SIGTERM to a run that W&B stops early. SLURM sends SIGUSR2: W&B must requeue the run."""
    long = [*COMMAND[:-2], "epochs=40", "checkpoint.every_steps=100000"]
    with recorder() as server:
        folder = interrupted(long, signal.SIGTERM, tmp_path, as_agent(server, tmp_path, "one"))
        one = server.runs["one"]
        assert (one.exit_code, one.preempting, folder.state()) == (1, False, "preempted")

        interrupted(long, signal.SIGUSR2, tmp_path, as_agent(server, tmp_path, "two"))
        two = server.runs["two"]
        stopped = folder.read_status()
        assert (two.exit_code, two.preempting, folder.state(), stopped["wandb_id"]) == (1, True, "preempted", "two")
        assert two.config["resolved"]["run"] == folder.name

        whole = [*long, *arguments({**two.config, "_wandb": {"cli_version": "0.31.0"}})]
        done = subprocess.run(
            [sys.executable, str(ROOT / "launch.py"), *whole], cwd=tmp_path, env=as_agent(server, tmp_path, "two"),
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert f"resumed after step {stopped['step']}" in done.stdout
    assert server.unknown == []
    assert (two.exit_code, folder.state()) == (0, "finished")
    assert of(two, "examples") == read_rows(folder.metrics)  # layer rows have no examples


# Arguments of an agent.


def arguments(values: Json) -> list[str]:
    """Return a W&B sweep's choice as wandb renders it."""
    command = {"args": {key: {"value": value} for key, value in values.items()}}
    found: list[str] = create_sweep_command_args(command)["args_no_hyphens"]
    return found


def test_an_agents_none_is_null() -> None:
    found = overrides(arguments({"optimizer.norm_clip": None, "optimizer.betas": [0.9, 0.95], "sync_bn": True}))
    config = configuration("optimizer=lamb", *found)
    assert (config.optimizer.norm_clip, config.optimizer.betas, config.sync_bn) == (None, [0.9, 0.95], True)


def test_the_whole_configuration_of_a_preempted_run_gives_the_same_run() -> None:
    fixed = ["optimizer=tvlars", "batch_size=64", "dataset.val_fraction=0.1", "space={optimizer.lr:[1e-6,1]}"]
    chosen = {"optimizer.lr": 1.25e-05, "seed": 3}
    config = configuration(*fixed, *overrides(arguments(chosen)))
    held_by_wandb = {
        **asdict(config),
        **chosen,
        "resolved": {"lr": 1.25e-05},
        "_wandb": {"cli_version": "0"},
        "setting": "x",
    }
    again = overrides([*fixed, *arguments(held_by_wandb)])
    assert [item for item in again if "{" in item] == fixed[-1:]
    assert configuration(*again) == config


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["-m", "seed=0,1"], "-m: a W&B agent takes one run at a time"),
        (["cluster=slurm"], "cluster=slurm: a W&B agent would count a submitted run as finished"),
        (["tracker=none"], "a W&B sweep needs its runs' metrics"),
    ],
)
def test_unsupported_agent_commands_fail_before_the_run(tmp_path: Path, command: list[str], says: str) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *RECORDED, *command], cwd=tmp_path, timeout=60, capture_output=True,
        env=as_agent(Recorded(url="http://127.0.0.1:9"), tmp_path, "one"), text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert says in result.stderr
    assert not (tmp_path / "runs").exists()


# W&B sweeps in sweeps/wandb.


def ends(parameter: Json) -> list[Any]:
    """Return the values of a parameter, or its least and greatest value."""
    if "values" in parameter:
        return list(parameter["values"])
    assert parameter["min"] < parameter["max"], parameter
    return [parameter["min"], parameter["max"]]


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_every_sweep_is_valid_at_the_ends_of_its_parameters(file: Path) -> None:
    text = file.read_text()
    sweep = yaml.safe_load(text)
    assert f"#   wandb sweep sweeps/wandb/{file.name}\n" in text
    _validate_config_and_fill_distribution(sweep)  # as `wandb sweep` does
    assert sweep["program"] == "largebatch"
    assert sweep["project"] == "largebatch"
    before, after = sweep["command"][:3], sweep["command"][3:]
    assert (before, after[-1]) == (["${env}", "${program}", "run"], "${args_no_hyphens}")
    fixed = after[:-1]
    groups = [key for key in sweep["parameters"] if (ROOT / "conf" / key).is_dir()]
    assert groups == [], "W&B would store the choice's name in place of the group's configuration"
    for end in (0, -1):
        chosen = {key: ends(parameter)[end] for key, parameter in sweep["parameters"].items()}
        config = configuration(*fixed, *overrides(arguments(chosen)))
        validate(config)
        assert config.space == {key: [min(ends(p)), max(ends(p))] for key, p in sweep["parameters"].items()}
        assert config.dataset.val_fraction > 0
        assert config.tracker.name == "wandb"
    assert sweep["metric"]["goal"] == "maximize"
    assert sweep["metric"]["name"] == ("val/knn_accuracy" if config.mode.name == "bt" else "val/accuracy")
    if stopping := sweep.get("early_terminate"):
        every = config.mode.knn_every if config.mode.name == "bt" else config.eval_every
        assert config.epochs
        assert every
        assert stopping["type"] == "hyperband"
        assert 0 < stopping["min_iter"] < config.epochs // every  # min_iter counts evaluations


def test_compared_optimizers_get_the_same_number_of_trials() -> None:
    trials = {file.stem: yaml.safe_load(file.read_text())["run_cap"] for file in SWEEPS}
    compared = {count for name, count in trials.items() if name.startswith("cifar10_") and "bt" not in name}
    assert len(compared) == 1


@pytest.mark.parametrize(
    "command", [["sweeps=wandb/digits_tvlars"], ["-m", "sweeps=wandb/digits_tvlars"], ["sweeps/wandb=digits_tvlars"]]
)
def test_w_and_b_sweeps_are_refused_as_grids(tmp_path: Path, process: Programs, command: list[str]) -> None:
    result = process.call("launch", *command, cwd=tmp_path)
    assert result.code == 2
    assert f"`wandb sweep {ROOT}/conf/sweeps/wandb/digits_tvlars.yaml`" in result.stderr
