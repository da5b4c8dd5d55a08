"""The real program on the command line: help, mistakes and plans."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY, Launch, environment
from in_terminal import in_terminal
from programs import Programs

from largebatch.config.optimizers import Tvlars


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer=larss"], "optimizer=larss: allowed: adafactor, adagrad, .*did you mean lars"),
        (["optimizer.lrr=1"], "optimizer.lrr=1: lars has no such option; allowed: .*did you mean lr"),
        (["lr=3"], r"unknown key lr; did you mean optimizer.lr=3\? allowed: "),
        (["-m", "bs=64,128"], r"unknown key bs; did you mean batch_size=64\? allowed: "),
        (["+typo=1"], "unknown key typo; allowed: "),
        (["batch_size=abc"], "batch_size=abc: .*Integer"),
        (["batch_size=-1"], "batch_size=-1: must be an integer of at least 1"),
        (["batch_size=4096"], "batch_size=4096: larger than the training set; digits has 1437 images"),
        (["optimizer.lr=nan"], "optimizer.lr=nan: must be a finite number above 0"),
        (["epochs=0"], "epochs=0: zero training steps are only allowed with mode=bt"),
        (["cluster.processes=0"], "cluster.processes=0: must be"),
        (["cluster.processes=3"], "batch_size=512: can't be divided over 3 processes. Fix: batch_size=510 or 513"),
        (["runs_dir=/proc/none"], "runs_dir=/proc/none: "),
        (["runs_dir=/dev/null/runs"], "runs_dir=/dev/null/runs: can't be written .Not a directory: /dev/null"),
        (["sweeps=demo"], "sweeps=demo: is a grid and needs -m. Fix: python launch.py -m sweeps=demo"),
        (["cases=[{seed:1},{seed:2}]"], "cases: only a grid has this key. Fix: add -m"),
        (["sweeps=demoo", "-m"], r"sweeps=demoo: allowed: .*demo.*; did you mean demo\?"),
        (["optimizer=lars,lamb"], "optimizer.*lars,lamb"),
        (["-m", "optimizer=lars,larss"], "larss"),
        (["-m", "optimizer=lars,tvlars", "optimizer.lmbda=0.1"], r"optimizer.lmbda=0.1: lars has no such option"),
        (["cluster.device=cuda"], "cluster.device=cuda: no GPU"),
        (["cluster.device=mps"], "cluster.device=mps: allowed: auto, cpu, cuda"),
        (["batch_size=[1,2"], "batch_size"),
    ],
)
def test_a_mistake_gives_one_message_and_exit_code_2(
    process: Programs, tmp_path: Path, overrides: list[str], message: str
) -> None:
    result = process.call("launch", *overrides, cwd=tmp_path)
    assert result.code == 2
    assert re.search(message, result.stderr), result.stderr
    assert all(line.startswith("error: ") for line in result.stderr.splitlines()), result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_help_names_groups_and_an_example(launch: Launch) -> None:
    result = launch("--help")
    assert result.returncode == 0
    for text in ("optimizer: ", "tvlars", "dataset: ", "sweeps: ", "python launch.py", "dry_run=true"):
        assert text in result.stdout


def test_cfg_job_shows_the_composed_configuration(tmp_path: Path, process: Programs) -> None:
    result = process.call("launch", "--cfg", "job", "optimizer=tvlars", "optimizer.eps=0.1", cwd=tmp_path)
    assert result.code == 0
    shown = yaml.safe_load(result.stdout)
    assert shown["optimizer"]["eps"] == 0.1
    assert set(shown["optimizer"]) == {field.name for field in dataclasses.fields(Tvlars)}
    part = process.call("launch", "--cfg", "job", "--package", "schedule", "schedule=cosine", cwd=tmp_path)
    assert yaml.safe_load(part.stdout) == {"name": "cosine", "final_factor": 0.0}
    assert process.call("launch", "--cfg", "job", "optimizer.lmbda=1", cwd=tmp_path).code == 2


def test_a_user_s_preset_in_another_folder_needs_only_name_and_lr(tmp_path: Path, process: Programs) -> None:
    folder = tmp_path / "presets" / "optimizer"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("name: lars\nlr: 1\n")
    for command in (
        ["--config-dir", str(tmp_path / "presets"), "optimizer=mine", "optimizer.momentum=0.5"],
        ["-m", f"hydra.searchpath=[{tmp_path / 'presets'}]", "optimizer=mine", "optimizer.momentum=0.5,0.6"],
    ):
        result = process.call("launch", *command, "dry_run=true", cwd=tmp_path)
        assert result.code == 0, result.stderr
        assert "b512-lr1-s0" in result.stdout


def test_shell_completion_knows_options_that_presets_leave_out(tmp_path: Path) -> None:
    line = "python launch.py optimizer.mom"
    completing = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_HYDRA_OLD_COMP": "/bin/true"}
    command = [sys.executable, str(ROOT / "launch.py"), "-sc", "query=bash"]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment() | completing, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["optimizer.momentum="]


@pytest.mark.parametrize("sign", ["", "+"])
def test_timm_model_options_need_no_plus(tmp_path: Path, process: Programs, sign: str) -> None:
    shown = ("model=timm", "--cfg", "job", "-p", "model", f"{sign}model.options.drop_rate=0.1")
    result = process.call("launch", *shown, cwd=tmp_path)
    assert yaml.safe_load(result.stdout)["options"] == {"drop_rate": 0.1}, result.stderr


@pytest.mark.parametrize("arguments", [["report", "--\x1b[31m"], ["st\x1b[31m"]], ids=["option", "command"])
def test_an_error_of_the_command_line_escapes_control_characters(
    tmp_path: Path, process: Programs, arguments: list[str]
) -> None:
    done = process.call("largebatch", *arguments, cwd=tmp_path)
    assert done.code == 2
    assert "\\x1b[31m" in done.stderr
    assert "\x1b" not in done.stderr


def test_the_launching_side_never_imports_torch() -> None:
    ours = (
        *("config.checks", "config.identity", "runs.watch", "runs.cancel", "cli", "launch.main", "launch.confirm"),
        *("tracking.sync", "report.build", "report.confirm", "report.critical", "report.fit_lr", "report.page"),
    )
    modules = ", ".join([*(f"largebatch.{name}" for name in ours), "launch"])
    code = f"import sys; import {modules}; print(sorted(m for m in sys.modules if m in {{'torch','wandb','timm'}}))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_dry_run_shows_the_plan_and_starts_nothing(launch: Launch, tmp_path: Path) -> None:
    result = launch("-m", "optimizer=lars,lamb", "seed=0,1", "batch_size=256", "dry_run=true")
    assert result.returncode == 0
    assert "4 run(s)" in result.stdout
    assert "optimizer=lamb seed=1" in result.stdout
    assert "batch_size=256" not in result.stdout  # labels omit overrides that all runs share
    assert list(tmp_path.iterdir()) == []


def test_equal_settings_make_one_run(tmp_path: Path, process: Programs) -> None:
    result = process.call("launch", "-m", "optimizer.lr=1,1.0", "dry_run=true", cwd=tmp_path)
    assert "1 run(s)" in result.stdout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=timm", "model.name=nonsense"], "model.name=nonsense: timm has no such model"),
        (["optimizer=timm", "optimizer.name=nonsense"], "optimizer.name=nonsense: timm has no such optimizer"),
        (["dataset=cifar10", "dataset.download=false", "tracker=none"], "dataset.root.*dataset.download"),
        (["schedule=warmup_cosine", "steps=10", "tracker=none"], "schedule.warmup_epochs=10: 28 steps of warm-up"),
    ],
)
def test_a_mistake_found_by_the_plan_or_the_worker_gives_one_message(
    process: Programs, tmp_path: Path, overrides: list[str], message: str
) -> None:
    result = process.call("launch", *overrides, cwd=tmp_path)
    assert result.code == 2
    assert re.search(message, result.stderr), result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "runs").exists()


def test_a_terminal_shows_a_line_before_the_slow_imports(tmp_path: Path) -> None:
    package = tmp_path / "first" / "hydra"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('importing hydra')")
    command, variables = (
        [sys.executable, str(ROOT / "launch.py"), "-m", "seed=0,1"],
        {"PYTHONPATH": str(package.parent)},
    )
    shown = in_terminal(command, tmp_path, 80, variables)
    assert shown.lines[:2] == ["composing the configurations ...", "importing hydra"]
    completing = in_terminal([*command, "-sc", "query=bash"], tmp_path, 80, variables)
    assert completing.lines[0] == "importing hydra"


def test_a_killed_worker_s_error_does_not_follow_its_progress_bar_on_a_line(tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(sent: bytes) -> None:
        if b"step/s" in sent and not killed:
            (status,) = tmp_path.glob("runs/*/status.json")
            killed.append(json.loads(status.read_text())["pid"])
            os.kill(killed[0], signal.SIGKILL)

    command = [sys.executable, str(ROOT / "launch.py"), *TINY, "steps=100000"]
    shown = in_terminal(command, tmp_path, 80, heard=kill)
    assert shown.code == 1
    assert any(line.startswith("error: the worker was ended by SIGKILL") for line in shown.lines)
    assert max(map(len, shown.lines)) <= 80


@pytest.mark.slow
def test_a_grid_in_a_terminal_of_80_columns_ends_with_reasons_and_the_next_command(tmp_path: Path) -> None:
    """One run finishes, then one fails, and the last diverges. W&B has no key."""
    # Only the worker knows the classes of the images: one held-out image can't be of each class.
    grid = "cases=[{optimizer.lr:0.1},{dataset.val_fraction:0.01},{optimizer.lr:1e30}]"
    command = [sys.executable, str(ROOT / "launch.py"), "-m", *TINY, "tracker=wandb", "steps=9", grid]
    shown = in_terminal(command, tmp_path, 80, {"HOME": str(tmp_path), "WANDB_API_KEY": ""})
    assert shown.code == 2
    *_, following, _ = shown.lines
    assert following == "next: largebatch report runs"
    start = next(i for i, line in enumerate(shown.lines) if re.match("run +settings +state +test", line))
    assert max(map(len, shown.lines)) <= 80
    text = " ".join(" ".join(shown.lines[start:]).split())
    assert re.search(r"lr=0.1 finished \d+\.\d\d %", text)
    assert re.search(r"lr=1e\+30 diverged - \S+ the loss was not finite at step \d", text)
    assert re.search(r"failed - - dataset.val_fraction=0.01: holding out 1 of 64", text)
    assert not re.search("W&B|network|key|offline", text)
    assert any(re.fullmatch(r" +2 to go, about 0:\d\d:\d\d left", line) for line in shown.lines)


def test_finished_runs_are_skipped_unless_rerun(tmp_path: Path, process: Programs) -> None:
    process.train(tmp_path, *TINY, "steps=4", "optimizer=lamb")
    command = ("-m", *TINY, "steps=4", "optimizer=lars,lamb")
    first = process.call("launch", *command, cwd=tmp_path)
    assert first.code == 0, first.stderr
    summaries = sorted((tmp_path / "runs").glob("*/summary.json"))
    assert len(summaries) == 2
    assert all(summary.parent.name in first.stdout for summary in summaries)  # the table has their folders
    before = [summary.stat().st_mtime_ns for summary in summaries]

    second = process.call("launch", *command, cwd=tmp_path)
    assert second.code == 0
    shown = re.findall(r"finished before, test accuracy (\S+) %; not repeated", second.stdout)
    assert shown == re.findall(r"finished(?: before)?, test accuracy (\S+) %", first.stdout)
    assert len(shown) == 2
    assert [summary.stat().st_mtime_ns for summary in summaries] == before

    for optimizer in ("lars", "lamb"):
        process.train(tmp_path, *TINY, "steps=4", f"optimizer={optimizer}", "rerun=true")
    assert all(summary.stat().st_mtime_ns > old for summary, old in zip(summaries, before, strict=True))
    for summary in summaries:  # the earlier result is kept
        previous = summary.parent / "previous-1" / "summary.json"
        assert json.loads(previous.read_text())["test/accuracy"] == json.loads(summary.read_text())["test/accuracy"]


def test_status_lists_runs(tmp_path: Path, process: Programs) -> None:
    process.train(tmp_path, *TINY, "steps=2")
    table = process.call("largebatch", "status", "runs", cwd=tmp_path).stdout
    assert "synthetic-smallcnn-clf-lars" in table
    assert "finished" in table
    (row,) = json.loads(process.call("largebatch", "status", "runs", "--json", cwd=tmp_path).stdout)
    assert row["state"] == "finished"
    assert row["step"] == 2


def test_a_closed_pipe_causes_no_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} {ROOT / 'launch.py'} -m 'seed=range(30)' dry_run=true | head -n 2"
    result = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stdout == "planning 30 runs\n30 run(s): 30 new; nothing is started (dry_run=true)\n"
    assert result.stderr == ""
