"""Clipping of the gradient's norm (``clip_norm``)."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import TINY
from programs import Programs
from same_run import assert_same_run
from steps import at_start, take_steps
from test_step import assert_nothing_is_read_back
from torch import Tensor

from largebatch.runs.metrics import read_rows
from largebatch.training.loss_scale import LossScale
from largebatch.training.phase import MainPhase

CLIP = 0.05  # below the norm of every gradient here


def gradient_of(phase: MainPhase) -> list[Tensor]:
    return [p.grad.clone() for p in phase.training.model.parameters() if p.grad is not None]


def norm_of(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def used_gradients(phase: MainPhase, steps: int) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Take steps. Return the gradient before each update, and the gradient that the optimizer used."""
    used: list[list[Tensor]] = []
    phase.training.optimizer.register_step_pre_hook(lambda *_: used.append(gradient_of(phase)))
    given: list[list[Tensor]] = []
    take_steps(phase, steps, lambda phase: given.append(gradient_of(phase)))
    return list(zip(given, used, strict=True))


@pytest.mark.parametrize("mode", [(), ("mode=bt",), ("mode=bt", "mode.exact=false")], ids=" ".join)
@pytest.mark.parametrize("division", [(), ("micro_batch=4",)], ids=" ".join)
def test_the_mean_gradient_is_clipped_once_over_all_parameters(
    tmp_path: Path, mode: tuple[str, ...], division: tuple[str, ...]
) -> None:
    clip = 1e-5 if mode else CLIP
    phase = at_start(tmp_path, *mode, *division, f"clip_norm={clip}", "optimizer=sgd", "optimizer.lr=0.01")
    for given, used in used_gradients(phase, 2):
        factor = clip / (norm_of(given) + 1e-6)
        assert factor < 1
        for before, after in zip(given, used, strict=True):
            torch.testing.assert_close(after, before * factor, rtol=1e-4, atol=0)


def test_a_shorter_gradient_keeps_every_bit(tmp_path: Path) -> None:
    optimizers = ("lars", "clars", "vrlars optimizer.sample_size=2", "lamb")
    for number, optimizer in enumerate(optimizers):
        overrides = f"optimizer={optimizer}".split()
        plain, clipped = (
            at_start(tmp_path / f"{number} {clip}", *overrides, f"clip_norm={clip}") for clip in ("null", "1e6")
        )
        for phase in (plain, clipped):
            take_steps(phase, 3)
        expected = plain.training.model.state_dict()
        assert all(torch.equal(tensor, expected[n]) for n, tensor in clipped.training.model.state_dict().items())


def test_the_row_of_a_step_has_the_norm_before_clipping(tmp_path: Path) -> None:
    phase = at_start(tmp_path, f"clip_norm={CLIP}", "optimizer=sgd", "optimizer.lr=0.01")
    norms = [norm_of(given) for given, _ in used_gradients(phase, 3)]
    mean, each = phase.train_rows()
    assert [row["optim/gradient_norm"] for row in each] == pytest.approx(norms, rel=1e-5)
    assert mean[0]["optim/gradient_norm"] == each[-1]["optim/gradient_norm"]
    assert type(each[0]["optim/gradient_norm"]) is float


@pytest.mark.parametrize("optimizer", ["lars", "tvlars", "clars", "vrlars optimizer.sample_size=2"])
def test_without_decay_clipping_changes_no_step_of_a_scaled_layer(tmp_path: Path, optimizer: str) -> None:
    """A factor of the gradient, and of the gradients of samples, cancels in the trust ratio."""
    overrides = (*f"optimizer={optimizer}".split(), "optimizer.weight_decay=0")
    plain, clipped = (at_start(tmp_path / f"{clip}", *overrides, f"clip_norm={clip}") for clip in ("null", CLIP))
    for phase in (plain, clipped):
        take_steps(phase, 1)
    expected = plain.training.model.state_dict()
    for name, tensor in clipped.training.model.state_dict().items():
        if tensor.ndim > 1:
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)
        else:
            assert not torch.equal(tensor, expected[name])


@pytest.mark.parametrize("optimizer", ["sgd", "clars"])
def test_the_unscaled_gradient_is_clipped_with_a_scaled_loss(tmp_path: Path, optimizer: str) -> None:
    """The scale is a power of two, so it must cancel exactly."""
    overrides = (f"optimizer={optimizer}", "optimizer.lr=0.01", f"clip_norm={CLIP}")
    plain, scaled = at_start(tmp_path / "plain", *overrides), at_start(tmp_path / "scaled", *overrides)
    scaled.training.loss_scale = LossScale(torch.device("cpu"), enabled=True)
    for phase in (plain, scaled):
        take_steps(phase, 3)
    expected = plain.training.model.state_dict()
    assert all(torch.equal(tensor, expected[n]) for n, tensor in scaled.training.model.state_dict().items())
    norms = [[row["optim/gradient_norm"] for row in phase.train_rows()[1]] for phase in (plain, scaled)]
    assert norms[0] == norms[1]


def test_a_gradient_that_is_not_finite_still_skips_the_step(tmp_path: Path) -> None:
    phase = at_start(tmp_path, f"clip_norm={CLIP}", "optimizer=sgd")
    phase.training.loss_scale = LossScale(torch.device("cpu"), enabled=True)
    before = {name: tensor.clone() for name, tensor in phase.training.model.state_dict().items()}

    def overflow(phase: MainPhase) -> None:
        gradient = next(phase.training.model.parameters()).grad
        assert gradient is not None
        gradient.view(-1)[0] = math.inf

    take_steps(phase, 1, overflow)
    assert phase.training.loss_scale.skipped == 1
    assert all(torch.equal(tensor, before[n]) for n, tensor in phase.training.model.state_dict().items())


@pytest.mark.parametrize("overrides", [(), ("micro_batch=4",), ("optimizer=clars",), ("mode=bt",)], ids=" ".join)
def test_a_clipped_step_reads_no_number_back(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    assert_nothing_is_read_back(tmp_path, *overrides, "clip_norm=0.1")


def test_a_clipped_run_resumes_exactly_and_logs_its_norms(tmp_path: Path, process: Programs) -> None:
    command = (
        *TINY, "steps=60", "checkpoint.every_steps=5", "tracker.log_every=7", "tracker.layers_every=3",
        f"clip_norm={CLIP}", "optimizer=sgd", "optimizer.lr=0.01", "cluster.threads=1", "cluster.processes=2",
    )  # fmt: skip
    whole = process.train(tmp_path / "whole", *command)
    rows = [row for row in read_rows(whole / "metrics.jsonl") if "train/loss" in row]
    assert all(row["optim/gradient_norm"] > CLIP for row in rows)
    run = process.kill(tmp_path / "stopped", 24, *command)
    assert process.train(tmp_path / "stopped", *command) == run
    assert "resumed after step" in (run / "log.txt").read_text()
    assert_same_run(run, whole)
