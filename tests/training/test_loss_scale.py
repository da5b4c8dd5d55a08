"""Loss scaling of fp16: it cancels exactly, skips steps that aren't finite, and resumes exactly."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, configuration
from programs import Programs
from runs import parameters
from same_run import assert_same_run
from torch import nn

from largebatch.optim import CLARS, LAMB, LARS, TVLARS
from largebatch.runs.folder import RunFolder
from largebatch.runs.metrics import read_rows
from largebatch.tracking.console import Console
from largebatch.training.loop import Session, loop
from largebatch.training.loss_scale import LossScale
from largebatch.training.phase import MainPhase
from largebatch.training.profile import StepClock
from largebatch.training.set_up import set_up
from largebatch.training.stop import StepBoundary

CPU = torch.device("cpu")
STEPS = 3


def after_steps(folder: Path, scaled: bool, *overrides: str) -> tuple[MainPhase, dict[str, torch.Tensor]]:
    """Train a few fp32 steps, with the loss times 65,536 if ``scaled``; return the phase and its parameters."""
    folder.mkdir()
    with Console(folder / "log.txt", speaking=False) as console:
        phase = set_up(configuration(*TINY, "steps=9", *overrides), RunFolder(folder), 0, 1, CPU, console, None)
    phase.training.loss_scale = LossScale(CPU, enabled=scaled)
    batches = phase.batches()
    for step in range(1, STEPS + 1):
        phase.training.step = step
        assert phase.gradient(batches) is not None
        phase.update(None)
    return phase, phase.training.model.state_dict()


@pytest.mark.parametrize("optimizer", ["lars", "lamb", "tvlars", "clars", "sgd"])
@pytest.mark.parametrize("mode", [(), ("mode=bt",)], ids=" ".join)
@pytest.mark.parametrize("division", [(), ("micro_batch=4",)], ids=" ".join)
def test_a_scale_that_is_a_power_of_two_changes_no_bit(
    tmp_path: Path, optimizer: str, mode: tuple[str, ...], division: tuple[str, ...]
) -> None:
    """fp32 gradients don't overflow at this scale, so it must cancel in the gradient and in CLARS's norms."""
    overrides = (f"optimizer={optimizer}", *mode, *division)
    _, plain = after_steps(tmp_path / "plain", False, *overrides)
    phase, scaled = after_steps(tmp_path / "scaled", True, *overrides)
    assert (phase.training.loss_scale.value, phase.training.loss_scale.skipped) == (65536.0, 0)
    assert all(torch.equal(scaled[name], plain[name]) for name in plain)


@pytest.mark.parametrize("build", [LARS, LAMB, TVLARS, CLARS])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_skips_the_step(build: Any, bad: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    optimizer = build(model.named_parameters(), lr=0.1)
    scale = LossScale(CPU, enabled=True)

    def step(value: float | None) -> bool:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, scale.value)
        if value is not None:
            assert model.bias.grad is not None
            model.bias.grad[0] = value  # one value of one tensor
        scale.unscale(optimizer)
        if isinstance(optimizer, CLARS):
            optimizer.set_sample_norms({layer: torch.tensor(value or 1.0) for layer in optimizer.layers})
        return scale.step(optimizer)

    assert step(None)
    weights, state, statistics = copy.deepcopy((model.state_dict(), optimizer.state_dict(), optimizer.layer_stats()))
    assert not step(bad)
    now = optimizer.state_dict()
    assert now["param_groups"] == state["param_groups"]
    torch.testing.assert_close(
        (model.state_dict(), now["state"], optimizer.layer_stats()),
        (weights, state["state"], statistics), rtol=0, atol=0,
    )  # fmt: skip
    assert (scale.value, scale.skipped) == (32768.0, 1)
    assert step(None)
    assert (scale.value, scale.skipped) == (32768.0, 1)
    assert bool(optimizer.layer_stats()["trust_ratio"].isfinite().all())
    assert not torch.equal(model.weight, weights["weight"])


# The loss of Barlow Twins without its factor of 0.001: the gradient overflows fp16 at the first scales.
OVERFLOWS = (
    *TINY, "precision=fp16", "mode=bt", "mode.loss_scale=1", "mode.knn_every=0", "mode.eval_epochs=2",
    "mode.lr_backbone=0.001", "steps=24", "checkpoint.every_steps=3", "optimizer=tvlars", "cluster.threads=1",
    "tracker.layers_every=1",
)  # fmt: skip


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_in_fp16_skips_steps_and_resumes_exactly(tmp_path: Path, process: Programs, processes: int) -> None:
    command = (*OVERFLOWS, f"cluster.processes={processes}")
    whole = process.train(tmp_path / "whole", *command)
    rows = [row for row in read_rows(whole / "metrics.jsonl") if "optim/skipped_steps" in row]
    skipped = json.loads((whole / "summary.json").read_text())["optim/skipped_steps"]
    assert 1 < skipped < 20
    assert [row["optim/skipped_steps"] for row in rows[:3]] == [1, 2, 3]
    assert [row["optim/loss_scale"] for row in rows[:2]] == [32768.0, 16384.0]
    assert rows[-1]["optim/loss_scale"] == 65536.0 / 2**skipped
    assert rows[0]["optim/phi"] == rows[1]["optim/phi"]  # the optimizer's clock stands while steps are skipped
    assert [row["step"] for row in rows[:20]] == list(range(1, 21))
    assert all(bool(tensor.isfinite().all()) for tensor in parameters(whole).values())

    run = process.kill(tmp_path / "stopped", 15, *command)
    assert process.train(tmp_path / "stopped", *command) == run
    assert "resumed after step" in (run / "log.txt").read_text()
    assert_same_run(run, whole)


def test_gradients_that_overflow_at_every_scale_are_a_divergence(tmp_path: Path) -> None:
    """The loss stays finite, so the loss alone doesn't show it."""
    with Console(tmp_path / "log.txt", speaking=False) as console:
        config = configuration(*TINY, "precision=fp16", "steps=60", "optimizer=sgd")
        phase = set_up(config, RunFolder(tmp_path), 0, 1, CPU, console, None)
        for parameter in phase.training.model.parameters():
            parameter.register_hook(lambda gradient: gradient * math.inf)
        boundary = StepBoundary(1e9, None, rank=1)
        session = Session(None, None, StepClock(0.0, CPU), console, boundary)
        state, message = loop(phase, session)
    assert (state, message) == ("diverged", "the gradient was not finite at step 42, at any loss scale")
