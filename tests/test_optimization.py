"""Learning rates, schedules and optimizers as the configuration asks for them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from conftest import configuration
from torch import nn

from largebatch import optim
from largebatch.errors import UserError
from largebatch.optimization import build_optimizer, resolved_lr, schedule_factor, warmup_steps


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)])
def test_learning_rate_rules(rule: str, factor: float) -> None:
    config = configuration("batch_size=1024", "optimizer.lr=0.3", f"lr_scaling.rule={rule}")
    assert resolved_lr(config) == pytest.approx(0.3 * factor)


def rates(*overrides: str, steps: int, epoch_steps: int = 5) -> list[float]:
    config = configuration(*overrides).schedule
    factor = schedule_factor(config, steps, warmup_steps(config, epoch_steps))
    return [factor(step) for step in range(steps)]


def test_constant_is_constant() -> None:
    assert rates("schedule=constant", steps=7) == [1.0] * 7


def test_cosine_is_torch_s_cosine_annealing() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.01)
    expected = []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates("schedule=cosine", "schedule.final_factor=0.01", steps=40) == pytest.approx(expected, abs=1e-9)


def test_warmup_cosine_rises_linearly_then_falls_once() -> None:
    got = rates("schedule=warmup_cosine", "schedule.warmup_epochs=2", steps=50)
    assert got[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert got[10] == pytest.approx(1.0)
    assert got[30] == pytest.approx(0.001 + 0.999 / 2)
    assert all(later < earlier for earlier, later in pairwise(got[10:]))
    assert 0.001 < got[-1] < 0.01


def test_warmup_poly_is_lars_s_decay() -> None:
    overrides = ("schedule=warmup_poly", "schedule.warmup_steps=4", "schedule.warmup_epochs=null")
    got = rates(*overrides, steps=24)
    assert got[3] == 1.0
    assert got[4:] == pytest.approx([(1 - step / 20) ** 2 for step in range(20)])


def test_warmup_that_fills_the_training_is_refused() -> None:
    with pytest.raises(UserError, match=r"schedule\.warmup_epochs=10.* 50 steps of warm-up, but the training has 40"):
        rates("schedule=warmup_cosine", steps=40)


def test_tvlars_delay_is_given_in_epochs_and_its_floor_follows_the_batch() -> None:
    config = configuration(
        "optimizer=tvlars", "optimizer.delay_epochs=3", "optimizer.gamma_min=auto", "batch_size=1024"
    )
    optimizer = build_optimizer(config, nn.Linear(2, 2), steps_per_epoch=7)
    assert isinstance(optimizer, optim.TVLARS)
    assert optimizer.param_groups[0]["delay"] == 21
    assert optimizer.param_groups[0]["gamma_min"] == pytest.approx(0.004)


@pytest.mark.parametrize(
    "name",
    ["lars", "lamb", "tvlars", "tvlars_published", "lamb_published", "sgd", "adam", "adamw", "adagrad", "rmsprop"],
)
def test_every_optimizer_takes_a_step_downhill_with_its_preset(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))
    inputs, targets = torch.randn(64, 6), torch.randn(64, 1)
    optimizer = build_optimizer(configuration(f"optimizer={name}", "optimizer.lr=0.01"), model, steps_per_epoch=1)
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert math.isfinite(losses[-1])
    assert losses[-1] < losses[0]


def test_timm_optimizers_by_name() -> None:
    model = nn.Linear(3, 3)
    config = configuration("optimizer=timm", "optimizer.name=lion", "+optimizer.options.betas=[0.8,0.9]")
    optimizer = build_optimizer(config, model, steps_per_epoch=1)
    assert type(optimizer).__name__ == "Lion"
    assert tuple(optimizer.param_groups[0]["betas"]) == (0.8, 0.9)
    with pytest.raises(UserError, match=r"timm has no such optimizer.*did you mean lion"):
        build_optimizer(configuration("optimizer=timm", "optimizer.name=lionn"), model, steps_per_epoch=1)


def test_published_lamb_has_no_bias_correction_and_adapts_everything() -> None:
    group = build_optimizer(configuration("optimizer=lamb_published"), nn.Linear(2, 2), 1).param_groups[0]
    assert (group["bias_correction"], group["norm_clip"], group["adapt_1d"], group["decay_1d"]) == (
        False,
        10,
        True,
        True,
    )
