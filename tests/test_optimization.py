"""Learning rates, schedules and optimizers as the configuration asks for them."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import TINY, Launch, configuration
from torch import nn

from largebatch import optim
from largebatch.errors import UserError
from largebatch.optimization import build_optimizer, resolved_lr, schedule_factor, warmup_steps
from largebatch.tracking.metrics import read_rows


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)])
def test_learning_rate_rules(rule: str, factor: float) -> None:
    config = configuration("batch_size=1024", "optimizer.lr=0.3", f"lr_scaling.rule={rule}")
    assert resolved_lr(config) == pytest.approx(0.3 * factor)


def surge_lr(batch_size: int, *overrides: str, noise_scale: float = 1000) -> float:
    rule = ("optimizer=adamw", "lr_scaling.rule=surge", f"lr_scaling.noise_scale={noise_scale}")
    return resolved_lr(configuration(*rule, "optimizer.lr=0.002", f"batch_size={batch_size}", *overrides))


@pytest.mark.parametrize("batch", [1, 17, 256, 1000, 4096, 10**6])
@pytest.mark.parametrize("base", [64, 256, 5000])
def test_surge_rule_is_the_paper_s_formula_through_the_base_batch(batch: int, base: int) -> None:
    def optimum(size: int) -> float:
        """Arxiv 2405.14578, theorem 3, for an unknown largest rate of 1."""
        return 1 / (0.5 * (math.sqrt(1000 / size) + math.sqrt(size / 1000)))

    got = surge_lr(batch, f"lr_scaling.base_batch={base}")
    assert got == pytest.approx(0.002 * optimum(batch) / optimum(base), rel=1e-12)
    assert surge_lr(base, f"lr_scaling.base_batch={base}") == 0.002


def test_surge_rule_rises_like_the_square_root_peaks_at_the_noise_scale_and_falls() -> None:
    base = "lr_scaling.base_batch=1"
    small = surge_lr(4, base, noise_scale=1e9) / surge_lr(1, base, noise_scale=1e9)
    assert small == pytest.approx(2.0, rel=1e-6)
    got = {size: surge_lr(size) for size in (250, 500, 999, 1000, 1001, 2000, 4000)}
    assert max(got, key=lambda size: got[size]) == 1000
    assert got[500] == pytest.approx(got[2000])  # the same on either side of the peak
    assert got[250] == pytest.approx(got[4000])
    assert got[250] < got[500] < got[1000]


def test_surge_rule_is_the_best_rate_of_sign_descent_on_a_quadratic() -> None:
    """The formula against what it is a limit of: the rate that lowers a quadratic loss most, in expectation.

    One step ``x -= lr * sign(g)`` with gradient coordinates of mean m and deviation s / sqrt(B) changes the loss by
    ``-lr * n * m * E + lr**2 / 2 * (sum of H_ij E[sign_i sign_j])`` with ``E = erf(sqrt(B / 2) * m / s)``.
    """
    n, mean, deviation, diagonal, off_diagonal = 50, 0.002, 1.0, 1.0, 0.5
    ratio = mean / deviation
    noise_scale = math.pi * n * diagonal / (2 * n * (n - 1) * off_diagonal * ratio**2)

    def best_rate(size: int) -> float:
        mean_sign = math.erf(math.sqrt(size / 2) * ratio)
        curvature = n * diagonal + n * (n - 1) * off_diagonal * mean_sign**2
        return n * mean * mean_sign / curvature

    base = round(noise_scale / 64)
    for size in (base // 8, base * 8, round(noise_scale), round(noise_scale * 4)):
        ours = surge_lr(size, f"lr_scaling.base_batch={base}", noise_scale=noise_scale) / 0.002
        assert ours == pytest.approx(best_rate(size) / best_rate(base), rel=0.08)


def test_surge_rate_in_a_run_is_printed_and_stored(launch: Launch, tmp_path: Path) -> None:
    rule = ("lr_scaling.rule=surge", "lr_scaling.noise_scale=64", "lr_scaling.base_batch=4")
    result = launch(*TINY, "steps=2", "optimizer=adamw", "optimizer.lr=0.001", *rule)
    assert result.returncode == 0, result.stderr
    # Theorem 3 at batch 16 over batch 4: (4 + 1/4) / (2 + 1/2) = 1.7.
    assert "lr 0.0017 (optimizer.lr=0.001, lr_scaling.rule=surge, lr_scaling.noise_scale=64)" in result.stdout
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "summary.json").read_text())["lr"] == pytest.approx(0.0017)
    assert read_rows(run / "metrics.jsonl")[0]["optim/lr"] == pytest.approx(0.0017)
    refused = launch(*TINY, "steps=2", "optimizer=lars", *rule)
    assert refused.returncode == 2
    assert "lr_scaling.force=true" in refused.stderr


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
