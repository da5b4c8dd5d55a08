"""``largebatch confirm``: choose, confirm with the real program, report, repeat and resume."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import TINY, environment, start
from programs import Programs
from runs import finish

from largebatch.runs.metrics import read_rows

GRID = (
    *TINY, "dataset.val_fraction=0.25", "epochs=2", "tracker.layers_every=0", "tracker.group=tried",
    "cluster.threads=1",
)  # fmt: skip


def largebatch(*arguments: str | Path, **popen: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "largebatch.cli", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
    )  # type: ignore[call-overload,no-any-return]


def called(process: Programs, *arguments: str | Path) -> str:
    """Return the output of a command."""
    ended = process.call("largebatch", *map(str, arguments), cwd=Path.cwd())
    assert ended.code == 0, ended.output
    return ended.stdout


def refused(process: Programs, *arguments: str | Path) -> str:
    """Return the error of a command that must fail with exit code 2."""
    ended = process.call("largebatch", *map(str, arguments), cwd=Path.cwd())
    assert ended.code == 2, ended.output
    assert "Traceback" not in ended.output
    return ended.stderr


@pytest.fixture(scope="module")
def explored(tmp_path_factory: pytest.TempPathFactory, process: Programs) -> Path:
    """Two optimizers with two learning rates and two seeds each."""
    folder = tmp_path_factory.mktemp("explored")
    for optimizer, best in (("lars", "1"), ("lamb", "0.01")):
        for lr, seed in itertools.product(("1e-6", best), (0, 1)):
            process.train(folder, *GRID, f"optimizer={optimizer}", f"optimizer.lr={lr}", f"seed={seed}")
    return folder / "runs"


@pytest.fixture
def runs_dir(explored: Path, tmp_path: Path) -> Path:
    return shutil.copytree(explored, tmp_path / "runs")


def configs(runs_dir: Path) -> dict[str, dict[str, object]]:
    """Return the frozen configuration of each run, by the run's name."""
    return {path.parent.name: yaml.safe_load(path.read_text()) for path in runs_dir.glob("*/config.yaml")}


def best_learning_rates(runs_dir: Path) -> dict[str, float]:
    """Return for each optimizer the learning rate with the highest sum of validation accuracies."""
    sums: dict[str, dict[float, float]] = {}
    for name, config in configs(runs_dir).items():
        optimizer: dict[str, object] = config["optimizer"]  # type: ignore[assignment]
        accuracy = json.loads((runs_dir / name / "summary.json").read_text())["best/val/accuracy"]
        of_optimizer = sums.setdefault(str(optimizer["name"]), {})
        lr = float(str(optimizer["lr"]))
        of_optimizer[lr] = of_optimizer.get(lr, 0.0) + accuracy
    return {name: max(sorted(found), key=lambda lr: found[lr]) for name, found in sums.items()}


def test_confirm_runs_the_chosen_settings_on_fresh_seeds_and_the_report_shows_only_these(
    runs_dir: Path, process: Programs
) -> None:
    before, best = configs(runs_dir), best_learning_rates(runs_dir)
    out = finish(largebatch("confirm", runs_dir, "--seeds", "2", "cluster.parallel=2", "cluster.threads=1"))
    assert "seeds: 2, 3" in out
    assert out.rstrip().endswith(f"largebatch report {runs_dir}")
    new = {name: config for name, config in configs(runs_dir).items() if name not in before}
    found = sorted((c["optimizer"]["name"], c["optimizer"]["lr"], c["seed"]) for c in new.values())  # type: ignore[index]
    assert found == [(name, best[name], seed) for name in ("lamb", "lars") for seed in (2, 3)]
    undecided = ("seed", "cluster", "runs_dir", "confirms")
    for config in new.values():
        assert config["confirms"] is True
        twins = [{**old, **{key: config[key] for key in undecided}} for old in before.values()]
        assert config in twins  # all other keys are those of a run before

    rows = list(csv.DictReader(io.StringIO(called(process, "report", runs_dir, "--format", "csv"))))
    assert sorted(row["run"] for row in rows if row["reported"]) == sorted(new)
    markdown = called(process, "report", runs_dir, "--format", "md")
    assert "Each cell: 2 settings, 2 confirmation seeds." in markdown
    assert "unconfirmed" not in markdown
    page = called(process, "report", runs_dir, "--out", "-")
    assert "2 settings, 2 confirmation seeds" in page
    assert "Confirmation seeds: the chosen setting ran again" in page

    times = {path: path.stat().st_mtime_ns for path in runs_dir.glob("*/summary.json")}
    again = called(process, "confirm", runs_dir, "--seeds", "2")
    assert len(re.findall(r"finished before, test accuracy \S+ %; not repeated", again)) == 4
    assert {path: path.stat().st_mtime_ns for path in runs_dir.glob("*/summary.json")} == times

    more = called(process, "confirm", runs_dir, "--seeds=3", "--dry-run")
    assert "seeds: 2, 3, 4\n6 run(s): 4 finished, 2 new; nothing is started" in more
    assert len(configs(runs_dir)) == len(before) + 4


@pytest.mark.slow
def test_a_killed_confirmation_resumes_with_the_same_seeds(tmp_path: Path) -> None:
    tiny = (*TINY, "steps=60", "eval_every=100", "checkpoint.every_steps=5", "tracker.log_every=1", "cluster.threads=1")
    finish(start(*tiny, cwd=tmp_path))
    runs_dir = tmp_path / "runs"
    (first,) = runs_dir.iterdir()
    process = largebatch("confirm", runs_dir, "--seeds", "2", "cluster.threads=1")
    deadline = time.monotonic() + 100
    while not (rows := [row for path in runs_dir.glob("*-s1-*/metrics.jsonl") for row in read_rows(path)]) or (
        rows[-1]["step"] < 12
    ):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    (stopped,) = runs_dir.glob("*-s1-*")
    assert not (stopped / "summary.json").exists()
    out = finish(largebatch("confirm", runs_dir, "--seeds", "2", "cluster.threads=1"))
    assert "resumed after step" in out
    assert sorted(config["seed"] for config in configs(runs_dir).values()) == [0, 1, 2]  # type: ignore[type-var]
    assert all((path / "summary.json").exists() for path in runs_dir.iterdir() if path != first)


def test_overrides_place_the_runs_and_cannot_change_a_setting(runs_dir: Path, process: Programs) -> None:
    on_slurm = ("cluster=slurm", "--seeds", "4", "cluster.partition=gpu")
    out = called(process, "confirm", runs_dir, *on_slurm, "--dry-run")
    assert "8 run(s): 8 new; nothing is started" in out
    assert "#SBATCH --partition=gpu" in out
    assert "#SBATCH --array=0-7" in out
    for overrides, message in (
        (["batch_size=8"], "batch_size: differs from the setting"),
        (["optimizer=sgd"], "optimizer: differs from the setting"),
        (["seed=3"], "seed=3: largebatch confirm sets this key. Fix: --seeds"),
        (["cluster=slrm"], "cluster=slrm: allowed: .*did you mean slurm"),
        (["--seeds", "0"], "--seeds=0: too few"),
        (["--by", "optimizer.momentm"], "--by=optimizer.momentm: no run has this key"),
        (["--seed", "3", "--nonsense"], "unrecognized arguments: --nonsense"),
    ):
        assert re.search(message, refused(process, "confirm", runs_dir, *overrides))
    assert len(configs(runs_dir)) == 8


def test_a_folder_without_a_finished_run_has_nothing_to_confirm(runs_dir: Path, process: Programs) -> None:
    for status in runs_dir.glob("*/status.json"):
        status.write_text(status.read_text().replace('"finished"', '"diverged"'))
    assert "no run has finished, so no setting is chosen" in refused(process, "confirm", runs_dir)
    assert "not a folder" in refused(process, "confirm", runs_dir / "none")
