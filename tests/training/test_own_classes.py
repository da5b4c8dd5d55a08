"""Runs with own classes, from an empty folder with the example package: all that other runs have, and faults."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
from conftest import ROOT, TARGETS, environment, start
from programs import Programs
from runs import finish, the_run, timeless

from largebatch.config import source
from largebatch.config.typed import load_config
from largebatch.launch import slurm
from largebatch.launch.plan import PlannedRun
from largebatch.runs.folder import RunFolder

OWN = tuple(
    override for group, target in TARGETS.items() for override in (f"{group}=custom", f"{group}.target={target}")
)
RUN = (
    *OWN, "optimizer.options.beta=0.5", "model.batch_norm=false", "dataset.options.train_size=128", "batch_size=32",
    "dataset.val_fraction=0.25", "steps=12", "checkpoint.every_steps=5", "tracker=none", "cluster.threads=1",
    "tracker.layers_every=2", "tracker.log_every=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the example package and a finished run."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "examples" / "mylab", folder / "mylab", ignore=shutil.ignore_patterns("__pycache__"))
    finish(start(*RUN, cwd=folder))
    return folder


def summary(run: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "summary.json").read_text())
    return found


def test_a_run_has_the_names_of_its_classes_and_its_layers(folder: Path, process: Programs) -> None:
    run = the_run(folder)
    assert run.name.startswith("stripes-Perceptron-clf-SignMomentum-staircase-b32-lr0.003-s0-")
    layers = pyarrow.parquet.read_table(run / "layers.parquet").to_pylist()
    assert {row["layer"] for row in layers} == {
        f"{name}.{of}" for name in ("hidden", "head") for of in ("weight", "bias")
    }
    assert {row["trust_ratio"] for row in layers} == {1.0}
    rates = [row["optim/lr"] for row in timeless(run) if "optim/lr" in row]
    assert rates[0] == pytest.approx(0.003)
    assert rates[-1] == pytest.approx(0.003 / 4)
    report = process.call("largebatch", "report", "runs", "--format", "md", cwd=folder)
    assert report.code == 0, report.output
    assert "SignMomentum, staircase" in report.output


def test_resuming_is_exact(folder: Path, tmp_path: Path, process: Programs) -> None:
    run = tmp_path / the_run(folder).name
    shutil.copytree(the_run(folder), run)
    RunFolder(run).update_status(state="preempted")
    (run / "summary.json").unlink()
    newest = max(run.glob("checkpoints/step-*.pt"), key=lambda path: path.name)
    newest.unlink()
    ended = process.call("worker", str(run), cwd=folder)
    assert ended.code == 0, ended.output
    assert "resumed after step 10 of 12" in (run / "log.txt").read_text()
    assert timeless(run) == timeless(the_run(folder))
    assert summary(run)["checksum"] == summary(the_run(folder))["checksum"]


def test_two_processes_with_accumulation_train_the_same(folder: Path, tmp_path: Path, process: Programs) -> None:
    process.train(folder, *RUN, "cluster.processes=2", "micro_batch=8", f"runs_dir={tmp_path}/runs")
    one, two = (timeless(run) for run in (the_run(folder), the_run(tmp_path)))
    assert the_run(tmp_path).name == the_run(folder).name
    assert [row.get("train/loss") for row in two] == pytest.approx([row.get("train/loss") for row in one], abs=1e-4)


def test_replay_and_confirm_repeat_it(folder: Path, process: Programs) -> None:
    command = [sys.executable, "-P", "-m", "largebatch.cli", "replay", the_run(folder).name]  # -P: as the script
    replay = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=200, check=False
    )
    assert replay.returncode == 0, replay.stderr
    assert replay.stdout.endswith("equal, bit for bit\n")
    confirm = process.call("largebatch", "confirm", "runs", "--seeds", "1", "--dry-run", cwd=folder)
    assert confirm.code == 0, confirm.output
    assert "stripes-Perceptron-clf-SignMomentum-staircase-b32-lr0.003-s1-" in confirm.output


def test_a_grid_has_a_run_for_each_value_of_an_option(folder: Path, process: Programs) -> None:
    grid = process.call("launch", "-m", *RUN, "optimizer.options.beta=0.1,0.5", "dry_run=true", cwd=folder)
    assert grid.code == 0, grid.output
    assert "2 run(s): 1 new, 1 finished" in grid.output
    shown = process.call("launch", *RUN, "--cfg", "job", "-p", "optimizer", cwd=folder)
    assert "target: mylab.optimizer:SignMomentum\n" in shown.output
    assert "beta: 0.5\n" in shown.output


def test_a_changed_file_makes_another_run(folder: Path, tmp_path: Path, process: Programs) -> None:
    shutil.copytree(folder, tmp_path / "changed")
    with (tmp_path / "changed" / "mylab" / "optimizer.py").open("a") as file:
        file.write("# changed\n")
    plan = process.call("launch", *RUN, "dry_run=true", cwd=tmp_path / "changed")
    assert "1 run(s): 1 new" in plan.output, plan.output
    worker = process.call("worker", str(the_run(tmp_path / "changed")), cwd=tmp_path / "changed")
    assert worker.code == 2
    status = RunFolder(the_run(tmp_path / "changed")).read_status()
    assert "the code of mylab.optimizer has changed since" in status["message"]


def test_a_queued_job_runs_the_files_of_its_submission(
    folder: Path, tmp_path: Path, process: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy counts if the files have changed since, or aren't there."""
    run = RunFolder(tmp_path / "runs" / "one")
    run.path.mkdir(parents=True)
    shutil.copy(the_run(folder) / "config.yaml", run.config)
    monkeypatch.syspath_prepend(folder)
    for function in (source.find, source.files_of, source.version_of):
        function.cache_clear()
    slurm.copy_own_code(PlannedRun(load_config(run.config), run, ""))
    (copy,) = run.code.iterdir()
    example = (ROOT / "examples" / "mylab").glob("*.py")
    assert {path.name for path in copy.rglob("*") if path.is_file()} == {path.name for path in example}
    (tmp_path / "mylab").mkdir()
    (tmp_path / "mylab" / "optimizer.py").write_text("raise SystemExit('changed')\n")
    ended = process.call("worker", str(run.path), cwd=tmp_path)
    assert ended.code == 0, (ended.output, run.read_status())
    assert summary(run.path)["checksum"] == summary(the_run(folder))["checksum"]


@pytest.mark.parametrize("where", ["mylab/presets", "pkg://mylab.presets"])
@pytest.mark.parametrize("multirun", [(), ("-m",)])
def test_presets_of_a_folder_join_the_others(
    folder: Path, process: Programs, where: str, multirun: tuple[str, ...]
) -> None:
    found = process.call(
        "launch", *multirun, f"hydra.searchpath=[{where}]", "optimizer=sign_momentum", "dataset=stripes",
        "dry_run=true", cwd=folder,
    )  # fmt: skip
    assert found.code == 0, found.output
    assert "stripes-smallcnn-clf-sign_momentum-constant-b512-lr0.003" in found.output
    wrong = process.call("launch", *multirun, f"hydra.searchpath=[{where}]", "optimizer=sign_momentm", cwd=folder)
    assert wrong.code == 2
    assert "did you mean sign_momentum?" in wrong.output
