"""Training end to end: the run's folder, and equality over processes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow.parquet
import pytest
from conftest import TINY, Launch
from programs import Programs
from runs import parameters, the_run, train_in
from steps import at_start

from largebatch.errors import UserError
from largebatch.runs.metrics import read_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = ("steps=10", "optimizer=tvlars", "tracker.layers_every=5", "dataset.val_fraction=0.25")
    return train_in(tmp_path_factory.mktemp("runs") / "whole", *TINY, *options)


def test_a_run_writes_its_whole_folder(run: Path) -> None:
    assert {path.name for path in run.iterdir()} >= {
        "config.yaml", "status.json", "metrics.jsonl", "metrics.parquet", "layers.parquet", "summary.json",
        "checkpoints", "log.txt",
    }  # fmt: skip
    assert not list(run.rglob("*.tmp"))

    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["steps"]) == ("finished", 10, 10)
    assert {"pid", "host", "message", "queued", "started", "ended"} <= status.keys()

    rows = read_rows(run / "metrics.jsonl")
    logged = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in logged] == list(range(1, 11))
    assert {"epoch", "examples", "wall_seconds", "train/accuracy", "optim/lr", "optim/phi"} <= logged[-1].keys()
    assert {"perf/images_per_second", "perf/step_ms"} <= logged[-1].keys()
    evaluated = [row for row in rows if "test/accuracy" in row]
    assert [row["step"] for row in evaluated] == [3, 6, 9, 10]  # an epoch of 48 images has three steps of 16
    assert {"test/loss", "test/top5", "val/loss", "val/accuracy", "val/top5"} <= evaluated[-1].keys()
    assert pyarrow.parquet.read_table(run / "metrics.parquet").num_rows == len(rows)

    layers = pyarrow.parquet.read_table(run / "layers.parquet").to_pylist()
    assert [row["step"] for row in layers if row["layer"] == "head.weight"] == [1, 2, 5, 10]
    weights, others = ({row["layer"] for row in layers if (row["dimensions"] > 1) == many} for many in (True, False))
    assert weights == {"conv1.weight", "conv2.weight", "conv3.weight", "conv4.weight", "head.weight"}
    assert others == {f"norm{n}.{kind}" for n in (1, 2, 3, 4) for kind in ("weight", "bias")} | {"head.bias"}
    assert all(row["gradient_norm"] > 0 and row["trust_ratio"] > 0 for row in layers)
    assert all(row["weight_norm"] > 0 for row in layers if row["dimensions"] > 1)

    summary = json.loads((run / "summary.json").read_text())
    assert summary["test/accuracy"] == evaluated[-1]["test/accuracy"]
    chosen = max(evaluated, key=lambda row: (row["val/accuracy"], -row["step"]))
    assert summary["best/test/accuracy"] == chosen["test/accuracy"]
    assert summary["best/chosen_by"] == "val/accuracy"
    assert {"images_per_second", "wall_seconds", "git_commit", "versions", "lr", "per_process_batch"} <= summary.keys()


def test_every_row_except_the_first_has_the_speed(process: Programs, tmp_path: Path) -> None:
    run = process.train(tmp_path, *TINY, "steps=4", "tracker.log_every=1")
    timed = {row["step"]: row.get("perf/step_ms") for row in read_rows(run / "metrics.jsonl") if "train/loss" in row}
    assert timed.pop(1) is None  # it would include one-time work such as allocations
    assert len(timed) == 3
    assert all(0 < milliseconds < 1000 for milliseconds in timed.values())
    assert json.loads((run / "summary.json").read_text())["images_per_second"] > 0


# Rounding differences don't grow over 20 steps at this learning rate.
GENTLE = (*TINY, "steps=20", "optimizer=lars", "optimizer.lr=0.5", "cluster.threads=1")


@pytest.fixture(scope="module")
def undivided(tmp_path_factory: pytest.TempPathFactory, process: Programs) -> Path:
    """Run one process with undivided batches."""
    return process.train(tmp_path_factory.mktemp("runs"), *GENTLE)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the real program in two processes."""
    return train_in(tmp_path_factory.mktemp("runs") / "divided", *GENTLE, "cluster.processes=2")


def difference(one: Path, other: Path) -> float:
    """Return the largest difference of a parameter or running statistic."""
    a, b = parameters(one), parameters(other)
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


def test_two_processes_train_the_same(undivided: Path, two_processes: Path) -> None:
    assert difference(undivided, two_processes) < 1e-5


@pytest.mark.parametrize("division", [["micro_batch=4"], ["micro_batch=4", "cluster.processes=2"]])
def test_accumulation_trains_the_same(tmp_path: Path, process: Programs, undivided: Path, division: list[str]) -> None:
    assert difference(undivided, process.train(tmp_path, *GENTLE, *division)) < 1e-5


def test_tinycnn_trains_the_same_with_accumulation(tmp_path: Path, process: Programs) -> None:
    command = (*GENTLE, "model=tinycnn")
    whole, divided = (process.train(tmp_path / size, *command, f"micro_batch={size}") for size in ("16", "4"))
    assert 0 < difference(whole, divided) < 1e-5


def test_clars_trains_the_same_on_several_processes_and_with_accumulation(tmp_path: Path, process: Programs) -> None:
    """Gradient norms of groups of two samples are summed over micro-batches and processes."""
    command = (*GENTLE, "optimizer=clars", "optimizer.lr=2", "optimizer.sample_size=2")
    clars = process.train(tmp_path / "undivided", *command)
    assert "gradient norms of 2 samples at a time by hooks" in (clars / "log.txt").read_text()
    for division in ("cluster.processes=2", "micro_batch=4"):
        assert difference(clars, process.train(tmp_path / division, *command, division)) < 1e-5
    single = process.train(tmp_path / "single", *command, "optimizer.sample_size=1")
    assert difference(clars, single) > 1e-4


def test_clars_trains_a_model_with_parameters_outside_layers(tmp_path: Path, process: Programs) -> None:
    """A vision transformer's position embedding isn't a layer, so the norms are those of micro-batches."""
    vit = (
        "model=timm", "model.name=vit_tiny_patch16_224", "dataset.channels=3", "optimizer.sample_size=8",
        "+model.options={img_size:8,patch_size:4,depth:1,embed_dim:12,num_heads:2}", "steps=3",
    )  # fmt: skip
    run = process.train(tmp_path, *TINY, "optimizer=clars", "cluster.threads=1", *vit)
    log = (run / "log.txt").read_text()
    assert "gradient norms of 8 samples at a time by passes: cls_token" in log
    assert "1 process(es) x 2 micro-batch(es) of 8" in log
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_clars_sample_size_must_divide_the_micro_batch(tmp_path: Path) -> None:
    problem = "optimizer.sample_size=3: doesn't divide the micro-batch of 16 images. Fix: optimizer.sample_size=2"
    with pytest.raises(UserError, match=problem):
        at_start(tmp_path, "optimizer=clars", "optimizer.sample_size=3")


@pytest.fixture(scope="module")
def batch_norm(tmp_path_factory: pytest.TempPathFactory, process: Programs) -> Path:
    return process.train(tmp_path_factory.mktemp("runs"), *GENTLE, "model.norm=batch")


def test_batch_norm_trains_the_same_over_processes_only_if_synchronised(
    tmp_path: Path, process: Programs, batch_norm: Path
) -> None:
    command = (*GENTLE, "model.norm=batch", "cluster.processes=2")
    assert difference(batch_norm, process.train(tmp_path / "synchronised", *command, "sync_bn=true")) < 1e-5
    assert difference(batch_norm, process.train(tmp_path / "local", *command)) > 1e-3


def test_with_a_given_batch_norm_size_every_division_is_one_run_and_trains_the_same(
    tmp_path: Path, process: Programs, batch_norm: Path
) -> None:
    """Weights and running statistics are equal to rounding."""
    command = (*GENTLE, "model.norm=batch", "batch_norm_size=8")
    whole = process.train(tmp_path / "one", *command)
    for place, division in {
        "two": ["cluster.processes=2"],
        "synchronised": ["cluster.processes=2", "sync_bn=true"],
    }.items():
        divided = process.train(tmp_path / place, *command, *division)
        assert divided.name == whole.name
        assert difference(whole, divided) < 1e-5
        (ours, theirs) = (json.loads((run / "summary.json").read_text()) for run in (divided, whole))
        assert ours["test/loss"] == pytest.approx(theirs["test/loss"], rel=1e-4)
    assert batch_norm.name != whole.name
    assert difference(whole, batch_norm) > 1e-3


def test_a_model_with_batch_norm_that_claims_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.name=test_resnet: has batch norm \(conv1.1\)"):
        at_start(tmp_path, "model=timm", "model.name=test_resnet", "model.batch_norm=false")


def test_clars_by_passes_needs_a_batch_norm_size_of_one_pass(tmp_path: Path, process: Programs) -> None:
    """Norm layers that CLARS adapts can't be measured by hooks, and a pass is then over ``sample_size`` images."""
    clars = ("model.norm=batch", "optimizer=clars", "optimizer.adapt_1d=true", "optimizer.sample_size=4")
    problem = "batch_norm_size=16: optimizer=clars measures norms by passes.* Fix: batch_norm_size=4"
    with pytest.raises(UserError, match=problem):
        at_start(tmp_path / "refused", *clars)
    accepted = process.train(tmp_path, *TINY, "steps=2", *clars, "batch_norm_size=4")
    assert "1 process(es) x 4 micro-batch(es) of 4" in (accepted / "log.txt").read_text()


def test_every_test_image_counts_once_for_any_number_of_processes(
    tmp_path: Path, process: Programs, undivided: Path, two_processes: Path
) -> None:
    """2 processes can't share 21 test images evenly, and the accuracy is a multiple of 1/21 in every run."""
    by_three = process.train(tmp_path, *GENTLE, "batch_size=15", "cluster.processes=3")
    runs = (undivided, two_processes, by_three)
    one, two, three = (json.loads((run / "summary.json").read_text()) for run in runs)
    assert one["test/accuracy"] == two["test/accuracy"]
    assert one["test/loss"] == pytest.approx(two["test/loss"], rel=1e-4)
    for summary in (one, two, three):
        assert summary["test/accuracy"] * 21 == pytest.approx(round(summary["test/accuracy"] * 21), abs=1e-9)
        assert summary["test_images"] == 21


def test_divergence_is_an_outcome(tmp_path: Path, process: Programs) -> None:
    command = (*TINY, "steps=40", "optimizer=sgd", "optimizer.lr=1e30")
    run = process.train(tmp_path, *command)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "diverged"
    assert "the loss was not finite at step 2" in status["message"]
    summary = json.loads((run / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert summary["state"] == "diverged"
    assert {"precision", "channels_last", "device"} <= summary.keys()
    assert "diverged before" in process.call("launch", *command, cwd=tmp_path).output


FAULTY_LIBRARY = """
import sys

if "largebatch.training.worker" in sys.orig_argv:
    import torch

    def fail(*arguments, **options):
        raise ArithmeticError("a bug")

    torch.nn.functional.cross_entropy = fail
"""


def test_an_exception_is_one_line_on_stderr_and_a_traceback_in_the_log(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FAULTY_LIBRARY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]))
    result = launch(*TINY, "steps=2")
    assert result.returncode == 1
    run = the_run(tmp_path)
    assert result.stderr.startswith("error: ArithmeticError: a bug")
    assert len(result.stderr.splitlines()) == 1
    assert str(run / "log.txt") in result.stderr
    assert "Traceback" in (run / "log.txt").read_text()
    assert json.loads((run / "status.json").read_text())["state"] == "failed"


def test_bf16_trains(tmp_path: Path, process: Programs) -> None:
    run = process.train(tmp_path, *TINY, "steps=3", "precision=bf16")
    assert json.loads((run / "summary.json").read_text())["precision"] == "bf16"
