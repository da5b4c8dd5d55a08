"""Barlow Twins end to end: pre-training and linear probe in one run, equal for every division of the batch."""

from __future__ import annotations

import gzip
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, configuration
from offline import history_of
from programs import Programs
from runs import parameters, train_in
from torch import Tensor, nn

from largebatch.config.typed import load_config
from largebatch.data import MemoryImages, load_data
from largebatch.modes.bt import build_model, options
from largebatch.runs.folder import RESUMES, RunFolder
from largebatch.runs.metrics import read_rows
from largebatch.seeding import derive_seed
from largebatch.tracking.console import Console
from largebatch.training.loop import Session, loop
from largebatch.training.phase import MainPhase
from largebatch.training.profile import StepClock
from largebatch.training.set_up import set_up
from largebatch.training.state import Training
from largebatch.training.stop import StepBoundary

CPU = torch.device("cpu")
# The probe batch divides neither the 64 training images nor the 48 left by a validation part.
BT = (
    *TINY, "mode=bt", "mode.projector=[16,16]", "mode.eval_epochs=3", "mode.eval_batch_size=20", "cluster.threads=1",
    "dataset.last_batch=drop",
)  # fmt: skip


def checkpoint(run: Path, step: int) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(run / "checkpoints" / f"step-{step:08d}.pt", weights_only=True)
    return state


def of_backbone(model: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.items() if name.startswith("backbone.")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def summary_of(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def status_of(run: Path) -> dict[str, Any]:
    status: dict[str, Any] = json.loads((run / "status.json").read_text())
    return status


# 9 steps and three epochs of two probe steps, on 48 images.
WHOLE = (*BT, "steps=9", "dataset.val_fraction=0.25", "mode.knn_every=2", "model.norm=batch", "optimizer.lr=0.5")
RECORDED = (
    "tracker=wandb", "tracker.mode=offline", "tracker.layers_every=3", "profile=true", "checkpoint.every_seconds=1e6",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the real program in one process with everything recorded."""
    plain = [item for item in WHOLE if item != "tracker=none"]
    return train_in(tmp_path_factory.mktemp("runs") / "whole", *plain, *RECORDED)


def test_a_run_logs_neighbours_pretraining_and_probe(whole: Path) -> None:
    rows = read_rows(whole / "metrics.jsonl")
    neighbours = [row for row in rows if "test/knn_accuracy" in row]
    assert [row["step"] for row in neighbours] == [0, 6, 9]  # an epoch of 48 images has three steps of 16
    assert {"val/knn_accuracy", "embedding/std", "embedding/effective_rank"} <= neighbours[0].keys()
    assert rows[0] == neighbours[0]

    trained = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in trained] == list(range(1, 10))
    mode = options(load_config(whole / "config.yaml"))
    for row in trained:
        unscaled = row["train/on_diagonal"] + mode.lmbda * row["train/off_diagonal"]
        assert row["train/loss"] == pytest.approx(mode.loss_scale * unscaled, rel=1e-6)

    probed = rows[-3:]
    assert rows == [*sorted([*trained, *neighbours], key=lambda row: row["step"]), *probed]
    assert [(row["step"], row["probe/epoch"]) for row in probed] == [(11, 1), (13, 2), (15, 3)]
    assert [row["epoch"] for row in probed] == [4, 5, 6]
    assert [row["examples"] for row in probed] == [9 * 16 + epoch * 40 for epoch in (1, 2, 3)]
    for epoch, row in enumerate(probed):
        assert row["probe/lr"] == pytest.approx(0.3 * (1 + math.cos(math.pi * epoch / 3)) / 2)
        for split, images in (("val", 16), ("test", 21)):
            assert row[f"{split}/accuracy"] * images == pytest.approx(round(row[f"{split}/accuracy"] * images))
            assert row[f"{split}/top5"] == 1  # there are four classes
            assert row[f"{split}/loss"] > 0
        assert row["probe/accuracy"] * 40 == pytest.approx(round(row["probe/accuracy"] * 40))
        assert row["probe/loss"] > 0


def test_a_run_writes_status_summary_and_tables(whole: Path) -> None:
    rows, summary, status = read_rows(whole / "metrics.jsonl"), summary_of(whole), status_of(whole)
    assert (status["state"], status["step"], status["steps"]) == ("finished", 15, 15)
    assert (summary["state"], summary["step"], summary["steps"], summary["pretraining_steps"]) == (
        "finished",
        15,
        15,
        9,
    )
    assert (summary["probe_batch"], summary["probe_steps"]) == (20, 6)
    for name in ("test/accuracy", "test/loss", "val/accuracy", "probe/loss", "probe/accuracy"):
        assert summary[name] == rows[-1][name]
    (last,) = (row for row in rows if row["step"] == 9 and "test/knn_accuracy" in row)
    assert summary["test/knn_accuracy"] == last["test/knn_accuracy"]
    assert summary["embedding/effective_rank"] == last["embedding/effective_rank"]
    chosen = max(rows[-3:], key=lambda row: (row["val/accuracy"], -row["step"]))
    assert summary["best/chosen_by"] == "val/accuracy"
    assert summary["best/test/accuracy"] == chosen["test/accuracy"]
    assert summary["best/epoch"] == chosen["epoch"]

    assert pyarrow.parquet.read_table(whole / "metrics.parquet").num_rows == len(rows)
    layers = pyarrow.parquet.read_table(whole / "layers.parquet").to_pylist()
    assert {row["step"] for row in layers} == {1, 2, 3, 5, 6, 9}
    layers = [row for row in layers if row["dimensions"] > 1]
    projector = {"projector.first.weight", "projector.stages.0.linear.weight"}
    assert {row["layer"] for row in layers} == {f"backbone.conv{n}.weight" for n in (1, 2, 3, 4)} | projector
    assert all(row["weight_norm"] > 0 and row["gradient_norm"] > 0 for row in layers)
    assert "the loss over the global batch (mode.exact=true, " in (whole / "log.txt").read_text()


def test_a_run_is_profiled_and_copied_to_wandb(whole: Path) -> None:
    with gzip.open(whole / "profile" / "trace.json.gz") as handle:
        events = json.load(handle)["traceEvents"]
    phases = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    steps = phases.count("optimizer")
    assert steps == 6  # after three warm-up steps
    assert all(phases.count(name) >= steps for name in ("data", "forward", "backward"))
    assert (whole / "profile" / "shares.txt").exists()

    history, summary = history_of(whole)
    assert [row for row in history if not any(name.startswith("layers/") for name in row)] == read_rows(
        whole / "metrics.jsonl"
    )
    assert summary["test/accuracy"] == summary_of(whole)["test/accuracy"]
    assert (summary["step"], summary["epoch"]) == (15, 6)


def test_the_probe_evaluates_the_pretrained_backbone(whole: Path) -> None:
    """Recompute accuracy and loss on the test set from the checkpoint, with images normalised here."""
    final, config = checkpoint(whole, 15), load_config(whole / "config.yaml")
    assert same(final["model"], checkpoint(whole, 9)["model"])

    data = load_data(config.dataset, config.seed)
    model = build_model(config, data)
    model.load_state_dict(final["model"])
    head = nn.Linear(model.features, data.num_classes)
    head.load_state_dict(final["probe"]["head"])
    assert isinstance(data.test.images, MemoryImages)
    pixels = data.test.images.pixels.float() / 255
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (data.mean, data.std))
    with torch.no_grad():
        logits = head(model.eval().backbone((pixels - mean) / std))
    summary = summary_of(whole)
    assert summary["test/accuracy"] == int((logits.argmax(dim=1) == data.test.labels).sum()) / 21
    assert summary["test/loss"] == pytest.approx(float(F.cross_entropy(logits, data.test.labels)), rel=1e-5)
    trained = checkpoint(whole, 9)["probe"]["head"]
    assert not same(head.state_dict(), trained)
    assert float(trained["weight"].std()) == pytest.approx(0.01, rel=0.2)  # the initial weights


# Rounding differences don't grow over 12 steps at this learning rate.
GENTLE = (*BT, "steps=12", "optimizer.lr=0.5")


@pytest.fixture(scope="module")
def undivided(tmp_path_factory: pytest.TempPathFactory, process: Programs) -> Path:
    """Run one process with undivided batches."""
    return process.train(tmp_path_factory.mktemp("runs"), *GENTLE)


def assert_same_training(one: Path, other: Path) -> None:
    """Compare parameters, running statistics, the probe's linear layer, and metrics."""
    a, b = (parameters(run) for run in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6, msg=partial("{}: {}".format, name))
    c, d = (checkpoint(run, status_of(run)["step"])["probe"]["head"] for run in (one, other))
    for name in c:
        torch.testing.assert_close(c[name], d[name], rtol=1e-4, atol=1e-5)
    first, second = summary_of(one), summary_of(other)
    for metric in ("test/accuracy", "test/knn_accuracy"):
        assert first[metric] == second[metric]
    for metric in ("test/loss", "probe/loss", "train/loss", "embedding/std", "embedding/effective_rank"):
        assert first[metric] == pytest.approx(second[metric], rel=1e-4)


@pytest.mark.parametrize("division", [["cluster.processes=2"], ["cluster.processes=4", "micro_batch=2"]])
def test_any_division_of_the_batch_trains_the_same(
    tmp_path: Path, process: Programs, undivided: Path, division: list[str]
) -> None:
    assert_same_training(undivided, process.train(tmp_path, *GENTLE, *division))


def test_synchronised_batch_norm_trains_the_same_in_two_processes(
    tmp_path: Path, process: Programs, whole: Path
) -> None:
    assert_same_training(whole, process.train(tmp_path, *WHOLE, "sync_bn=true", "cluster.processes=2"))


@pytest.mark.slow
def test_fine_tuning_with_batch_norm_is_the_same_for_every_division(tmp_path: Path, process: Programs) -> None:
    """The probe's 6 images are one group, so the second of two processes has none without ``sync_bn``."""
    probe = ("mode.lr_backbone=0.01", "mode.eval_batch_size=6")
    command = (*GENTLE, *probe, "model.norm=batch", "batch_norm_size=8", "optimizer.lr=0.1")
    one = process.train(tmp_path / "one", *command)
    for place, division in {
        "two": ["cluster.processes=2"],
        "synchronised": ["cluster.processes=4", "sync_bn=true"],
    }.items():
        other = process.train(tmp_path / place, *command, *division)
        assert other.name == one.name
        assert_same_training(one, other)


def test_without_exact_another_network_is_trained_and_the_log_names_it(
    tmp_path: Path, process: Programs, undivided: Path
) -> None:
    run = process.train(tmp_path, *GENTLE, "mode.exact=false", "cluster.processes=2")
    ours, theirs = parameters(run), parameters(undivided)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in of_backbone(ours)) > 1e-3
    assert "the loss over each micro-batch of 8 images (mode.exact=false" in (run / "log.txt").read_text()
    assert status_of(run)["state"] == "finished"


def probed(folder: Path, *overrides: str) -> Training:
    """Return the training state after a probe of an untrained backbone."""
    phase = in_this_process(folder, "epochs=0", *overrides).following()
    assert phase is not None
    assert in_session(phase, folder) == ("finished", "")
    assert phase.training.step == 9
    return phase.training


def in_session(phase: MainPhase, folder: Path, stop: bool = False) -> tuple[str, str]:
    """Return state and message of a phase that only trains."""
    boundary = StepBoundary(3600.0, None, rank=0)
    boundary.asked_to_stop = stop
    with Console(folder / "log.txt", speaking=False) as console:
        return loop(phase, Session(None, None, StepClock(0.0, CPU), console, boundary))


@pytest.mark.parametrize("augmentation", ["true", "false"])
@pytest.mark.parametrize("backbone", ["0.0", "0.01"])
def test_accumulation_trains_the_same_probe(tmp_path: Path, backbone: str, augmentation: str) -> None:
    options = (f"mode.lr_backbone={backbone}", f"mode.eval_augmentation={augmentation}")
    whole, divided = (probed(tmp_path, *options, size) for size in ("micro_batch=null", "micro_batch=4"))
    assert whole.probe is not None
    assert divided.probe is not None
    torch.testing.assert_close(whole.probe.head.weight, divided.probe.head.weight, rtol=1e-5, atol=1e-6)
    untrained = in_this_process(tmp_path).training.model.state_dict()
    assert same(whole.model.state_dict(), untrained) is (backbone == "0.0")
    for ours, theirs in zip(whole.model.parameters(), divided.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_without_pretraining_the_untrained_backbone_is_evaluated(tmp_path: Path, process: Programs) -> None:
    run = process.train(tmp_path, *BT, "epochs=0", "schedule=warmup_cosine", "model.norm=batch")
    rows, summary = read_rows(run / "metrics.jsonl"), summary_of(run)
    assert [row["step"] for row in rows] == [0, 3, 6, 9]
    assert not any("train/loss" in row for row in rows)
    assert summary["test/knn_accuracy"] == rows[0]["test/knn_accuracy"]
    assert summary["test/accuracy"] == rows[-1]["test/accuracy"]
    assert (summary["state"], summary["pretraining_steps"]) == ("finished", 0)

    config = load_config(run / "config.yaml")
    torch.manual_seed(derive_seed(config.seed, "model"))
    untrained = build_model(config, load_data(config.dataset, config.seed)).state_dict()
    assert same(parameters(run), untrained)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "warmup_cosine", "warmup_poly", "wsd", "step"])
def test_every_schedule_allows_zero_steps(tmp_path: Path, schedule: str) -> None:
    training = in_this_process(tmp_path, "epochs=0", f"schedule={schedule}").training
    assert all(map(math.isfinite, training.schedule.get_last_lr()))


def in_this_process(folder: Path, *overrides: str) -> MainPhase:
    with Console(folder / "log.txt", speaking=False) as console:
        return set_up(configuration(*BT, *overrides), RunFolder(folder), 0, 1, CPU, console, None)


def test_a_stop_request_in_the_last_pretraining_step_stops_the_probe(tmp_path: Path) -> None:
    phase = in_this_process(tmp_path, "steps=1")
    assert in_session(phase, tmp_path, stop=True) == ("finished", "")
    following = phase.following()
    assert following is not None
    assert in_session(following, tmp_path, stop=True) == ("preempted", RESUMES)
    assert phase.training.step == 2


def test_a_diverged_pretraining_is_an_outcome(tmp_path: Path, process: Programs) -> None:
    run = process.train(tmp_path, *BT, "steps=40", "optimizer=sgd", "optimizer.lr=1e12")
    status = status_of(run)
    assert status["state"] == "diverged"
    assert "the loss was not finite at step " in status["message"]
    assert 2 <= int(status["message"].rsplit(" ", 1)[1]) <= status["step"] < 40
    assert summary_of(run)["state"] == "diverged"
    assert "test/accuracy" not in summary_of(run)
    assert "Traceback" not in (run / "log.txt").read_text()


def test_parameters_that_no_loss_shows_diverge_too(tmp_path: Path) -> None:
    phase = in_this_process(tmp_path, "epochs=1")
    phase.training.model.register_buffer("unused", torch.tensor(math.nan))
    assert in_session(phase, tmp_path) == ("diverged", f"parameters were not finite at step {phase.end}")


def test_a_diverged_probe_names_its_first_bad_step(tmp_path: Path) -> None:
    phase = in_this_process(tmp_path, "epochs=0", "mode.lr_classifier=1e30").following()
    assert phase is not None
    state, message = in_session(phase, tmp_path)
    assert state == "diverged"
    assert message.startswith("the loss was not finite at step ")
    assert int(message.rsplit(" ", 1)[1]) <= phase.training.step < 9


@pytest.mark.parametrize(("model", "division"), [("resnet50", ()), ("effb0", ("micro_batch=5",))])
def test_models_with_batch_norm_take_an_odd_batch(tmp_path: Path, process: Programs, model: str, division: Any) -> None:
    """The probe batch is larger than the training set."""
    small = ("dataset.image_size=16", "dataset.channels=3", "dataset.train_size=32", "batch_size=15", "steps=1")
    probe = ("mode.eval_epochs=1", "mode.eval_batch_size=256")
    summary = summary_of(process.train(tmp_path, *BT, *small, *probe, f"model={model}", "model.stem=cifar", *division))
    assert (summary["state"], summary["probe_batch"]) == ("finished", 32)
    assert summary["test/accuracy"] * 21 == pytest.approx(round(summary["test/accuracy"] * 21))
    assert math.isfinite(summary["train/loss"])
