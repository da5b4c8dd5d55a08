"""``largebatch fit-lr`` on folders of runs: tables, JSON, shorter training, measured noise scale, errors."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, environment
from made_runs import write_run
from programs import Programs

from largebatch.errors import UserError
from largebatch.report import fit_lr
from largebatch.runs.folder import RunFolder

BATCHES = (32, 128, 512, 2048, 8192, 32768)


def command(*arguments: str | Path, code: int = 0) -> str:
    """Return the output of the command, or its errors if it must fail."""
    program = [sys.executable, "-m", "largebatch.cli", "fit-lr", *map(str, arguments)]
    result = subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr if code else result.stdout


def row_of(text: str) -> dict[str, Any]:
    ((row,),) = [comparison["rows"] for comparison in json.loads(text)]
    return dict(row)


def surge(batch: float, noise_scale: float) -> float:
    return 0.008 / (0.5 * (math.sqrt(noise_scale / batch) + math.sqrt(batch / noise_scale)))


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid whose best learning rates follow the surge law: with N = 250 after epoch 4, with N = 1,000 after 16.

    The step that completes an epoch also begins the next, up to half a step.
    """
    folder = tmp_path_factory.mktemp("runs")
    overrides = ("dataset=digits", "optimizer=adam", "optimizer.lr=0.123", "batch_size=321", "dataset.val_fraction=0.1")
    first = write_run(folder, *overrides)
    config = first.config.read_text()
    for batch in BATCHES:
        for power in range(-11, -4):
            lr = 2.0**power
            run = RunFolder(shutil.copytree(first.path, folder / f"b{batch}-lr{lr}"))
            run.config.write_text(config.replace("lr: 0.123", f"lr: {lr}").replace("size: 321", f"size: {batch}"))
            rows = []
            for epoch, noise_scale in ((4, 250.0), (16, 1000.0)):
                error = (0.3 - epoch / 80) * math.exp(0.15 * math.log(lr / surge(batch, noise_scale)) ** 2)
                accuracy = 1 - min(error, 0.9)
                where = {
                    "step": 10 * epoch,
                    "epoch": epoch + (0.05 if batch > 128 else 0.0),
                    "examples": 1280 * epoch,
                    "wall_seconds": 2.0 * epoch,
                }
                noise = {"noise/scale": noise_scale, "noise/scale_low": 0.8 * noise_scale}
                noise["noise/scale_high"] = 1.2 * noise_scale
                rows.append(where | noise | {"val/accuracy": accuracy})
            run.metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
            best = {"best/chosen_by": "val/accuracy", "best/val/accuracy": accuracy, "best/test/accuracy": accuracy}
            summary = json.loads(run.summary.read_text()) | best | {"val_images": 50_000}
            run.summary.write_text(json.dumps(summary))
    shutil.rmtree(first.path)
    return folder


def test_the_law_of_the_whole_training_and_the_measured_noise_scale(runs_dir: Path) -> None:
    row = row_of(command(runs_dir, "--json"))
    assert row["row"] == "Adam"
    for batch in row["batches"]:
        assert batch["lr"]["value"] == pytest.approx(surge(batch["batch_size"], 1000), rel=0.02)
        assert batch["lr"]["low"] < batch["lr"]["value"] < batch["lr"]["high"]
    laws = {law["law"]: law for law in row["laws"]}
    assert laws["surge"]["parameter"]["value"] == pytest.approx(1000, rel=0.1)
    assert laws["surge_measured"]["parameter"] is None
    assert sum(law["weight"] for law in laws.values()) == pytest.approx(1)
    assert row["chosen"] == "surge_measured"
    assert row["noise_scale"] == {"value": 1000, "low": 800, "high": 1200}
    assert row["next_batch"] == 65536
    assert row["lr"]["value"] == pytest.approx(surge(65536, 1000), rel=0.05)


def test_a_shorter_training_has_its_own_law(runs_dir: Path) -> None:
    row = row_of(command(runs_dir, "--json", "--epochs", "4"))
    laws = {law["law"]: law for law in row["laws"]}
    assert laws["surge"]["parameter"]["value"] == pytest.approx(250, rel=0.1)
    assert row["noise_scale"] == {"value": 250, "low": 200, "high": 300}
    assert row["chosen"] == "surge_measured"


def test_without_an_upper_limit_the_measured_noise_scale_makes_no_law(runs_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(runs_dir, tmp_path / "runs")
    for log in folder.glob("*/metrics.jsonl"):
        log.write_text(log.read_text().replace('"noise/scale_high"', '"noise/other"'))
    row = row_of(fit_lr.fit_lr(folder, as_json=True))
    assert row["noise_scale"]["high"] is None
    assert row["chosen"] == "surge"


def test_a_batch_size_that_was_evaluated_later_has_no_learning_rate(runs_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(runs_dir, tmp_path / "runs")
    for log in folder.glob("b512-*/metrics.jsonl"):
        log.write_text(log.read_text().splitlines()[-1] + "\n")
    batch = row_of(fit_lr.fit_lr(folder, epochs=4, as_json=True))["batches"][2]
    assert (batch["batch_size"], batch["lr"], batch["reason"]) == (512, None, "no run was evaluated up to epoch 4")


def test_the_tables_have_every_law_and_end_with_one_sentence_and_a_prediction(runs_dir: Path) -> None:
    text = command(runs_dir, "--batch", "512")
    assert text.startswith("digits · smallcnn · classification\n\nAdam\n")
    for law in ("constant", "linear", "sqrt", "power", "sgd", "adam", "surge"):
        assert re.search(rf"^{law} +lr = ", text, re.MULTILINE)
    assert "learning rate at 512" in text
    last = text.splitlines()[-1]
    assert last.startswith("Law: surge_measured, surge with the measured N = 1,000, has 100% of the weight ")
    assert re.search(r" Learning rate at batch 512: 0\.00757 \(\S+ to \S+\)\. Measured noise scale: 1,000 \(", last)


def test_errors_name_the_option_and_the_fix(runs_dir: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((runs_dir, (), 0), "--batch=0: not a batch size. Allowed: 1 to 9007199254740992"),
        ((runs_dir, (), 10**400), "--batch=1000"),
        ((runs_dir, (), None, -1.0), "--epochs=-1: not a length of training"),
        ((runs_dir, (), None, 3.0), "--epochs=3: no run was evaluated so early"),
        ((runs_dir, ["optimizer.momentm"]), "--by=optimizer.momentm: no run has this key"),
        ((tmp_path,), "holds no readable run"),
        ((tmp_path / "none",), "not a folder"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            fit_lr.fit_lr(*arguments)
    assert "unrecognized arguments: optimizer.lr=1" in command(runs_dir, "optimizer.lr=1", code=2)


def test_small_real_runs_have_reasons_instead_of_a_law(tmp_path: Path, process: Programs) -> None:
    tiny = (*TINY, "optimizer=sgd", "dataset.val_fraction=0.25", "epochs=2", "tracker.layers_every=0")
    for lr in (0.01, 1, 100):
        process.train(tmp_path, *tiny, f"optimizer.lr={lr}")
    row = row_of(command(tmp_path / "runs", "--json"))
    ((batch,), chosen, laws) = row["batches"], row["chosen"], row["laws"]
    assert (batch["batch_size"], batch["tried"], chosen, laws) == (16, 3, None, [])
    assert (batch["lr"] is None) == bool(batch["reason"])
    last = command(tmp_path / "runs").splitlines()[-1]
    assert re.fullmatch(r"Law: best learning rates at \d batch sizes?; a choice of laws needs 3\.", last)
    for status in (tmp_path / "runs").glob("*/status.json"):
        status.write_text(status.read_text().replace('"finished"', '"failed"'))
    with pytest.raises(UserError, match="no run has finished, so there is nothing to fit"):
        fit_lr.fit_lr(tmp_path / "runs")
