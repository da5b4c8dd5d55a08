"""Learning rates, schedules and optimizers built from the configuration."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import TINY, configuration
from programs import Programs
from torch import nn

from largebatch import optim
from largebatch.config.checks import validate
from largebatch.config.identity import identity
from largebatch.errors import UserError
from largebatch.runs.folder import RunFolder
from largebatch.runs.metrics import read_rows
from largebatch.tracking.console import Console
from largebatch.training.facts import gather_facts
from largebatch.training.optimization import build_optimizer, resolved_lr
from largebatch.training.set_up import set_up


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)])
def test_learning_rate_rules(rule: str, factor: float) -> None:
    config = configuration("batch_size=1024", "optimizer.lr=0.3", f"lr_scaling.rule={rule}")
    assert resolved_lr(config) == pytest.approx(0.3 * factor)


def surge_lr(batch_size: int, *overrides: str, noise_scale: float = 1000) -> float:
    rule = ("optimizer=adamw", "lr_scaling.rule=surge", f"lr_scaling.noise_scale={noise_scale}")
    return resolved_lr(configuration(*rule, "optimizer.lr=0.002", f"batch_size={batch_size}", *overrides))


@pytest.mark.parametrize("batch", [1, 17, 256, 1000, 4096, 10**6])
@pytest.mark.parametrize("base", [64, 256, 5000])
def test_surge_rule_equals_the_paper_s_formula_scaled_at_the_base_batch(batch: int, base: int) -> None:
    def optimum(size: int) -> float:
        """Return arXiv 2405.14578, theorem 3, for a largest learning rate of 1."""
        return 1 / (0.5 * (math.sqrt(1000 / size) + math.sqrt(size / 1000)))

    got = surge_lr(batch, f"lr_scaling.base_batch={base}")
    assert got == pytest.approx(0.002 * optimum(batch) / optimum(base), rel=1e-12)
    assert surge_lr(base, f"lr_scaling.base_batch={base}") == 0.002


def test_surge_rule_rises_like_the_square_root_and_peaks_at_the_noise_scale() -> None:
    base = "lr_scaling.base_batch=1"
    small = surge_lr(4, base, noise_scale=1e9) / surge_lr(1, base, noise_scale=1e9)
    assert small == pytest.approx(2.0, rel=1e-6)
    got = {size: surge_lr(size) for size in (250, 500, 999, 1000, 1001, 2000, 4000)}
    assert max(got, key=lambda size: got[size]) == 1000
    assert got[500] == pytest.approx(got[2000])  # symmetric around the peak
    assert got[250] == pytest.approx(got[4000])
    assert got[250] < got[500] < got[1000]


@pytest.mark.parametrize(("off_diagonal", "within", "at_16"), [(0.5, 0.03, -0.13), (0.05, 0.16, -0.48)])
def test_surge_rule_is_the_best_learning_rate_of_sign_descent_on_a_quadratic(
    off_diagonal: float, within: float, at_16: float
) -> None:
    """The formula is a limit of the learning rate that lowers a quadratic loss most, in expectation.

    docs/lr_scaling.md has its errors.

    One step ``x -= lr * sign(g)`` with gradient coordinates of mean m and deviation s / sqrt(B) changes the loss by
    ``-lr * n * m * E + lr**2 / 2 * (sum of H_ij E[sign_i sign_j])`` with ``E = erf(sqrt(B / 2) * m / s)``.
    """
    n, mean, deviation, diagonal = 50, 0.002, 1.0, 1.0
    ratio = mean / deviation
    noise_scale = math.pi * n * diagonal / (2 * n * (n - 1) * off_diagonal * ratio**2)

    def best_lr(size: int) -> float:
        mean_sign = math.erf(math.sqrt(size / 2) * ratio)
        curvature = n * diagonal + n * (n - 1) * off_diagonal * mean_sign**2
        return n * mean * mean_sign / curvature

    base = round(noise_scale / 64)

    def error(size: int) -> float:
        ours = surge_lr(size, f"lr_scaling.base_batch={base}", noise_scale=noise_scale) / 0.002
        return ours / (best_lr(size) / best_lr(base)) - 1

    for size in (base // 8, base * 8, round(noise_scale), round(noise_scale * 4)):
        assert abs(error(size)) < within
    assert error(round(noise_scale * 16)) == pytest.approx(at_16, abs=0.01)


def test_a_run_prints_and_stores_its_surge_learning_rate(tmp_path: Path, process: Programs) -> None:
    rule = ("lr_scaling.rule=surge", "lr_scaling.noise_scale=64", "lr_scaling.base_batch=4")
    run = process.train(tmp_path, *TINY, "steps=2", "optimizer=adamw", "optimizer.lr=0.001", *rule)
    # Theorem 3 at batch 16 over batch 4: (4 + 1/4) / (2 + 1/2) = 1.7.
    assert (
        "lr 0.0017 (optimizer.lr=0.001, lr_scaling.rule=surge, lr_scaling.noise_scale=64)"
        in (run / "log.txt").read_text()
    )
    assert json.loads((run / "summary.json").read_text())["lr"] == pytest.approx(0.0017)
    assert read_rows(run / "metrics.jsonl")[0]["optim/lr"] == pytest.approx(0.0017)
    rejected = process.call("launch", *TINY, "steps=2", "optimizer=lars", *rule, cwd=tmp_path)
    assert rejected.code == 2
    assert "lr_scaling.force=true" in rejected.stderr


def factors(*overrides: str, steps: int, epoch_steps: int = 5) -> list[float]:
    factor = configuration(*overrides).schedule.factor(steps, epoch_steps)
    return [factor(step) for step in range(steps)]


def test_constant_is_constant() -> None:
    assert factors("schedule=constant", steps=7) == [1.0] * 7


def test_cosine_equals_torch_s_cosine_annealing() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.01)
    expected = []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert factors("schedule=cosine", "schedule.final_factor=0.01", steps=40) == pytest.approx(expected, abs=1e-9)


def test_warmup_cosine_rises_linearly_then_falls_once() -> None:
    got = factors("schedule=warmup_cosine", "schedule.warmup_epochs=2", steps=50)
    assert got[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert got[10] == pytest.approx(1.0)
    assert got[30] == pytest.approx(0.001 + 0.999 / 2)
    assert all(later < earlier for earlier, later in pairwise(got[10:]))
    assert 0.001 < got[-1] < 0.01


def test_warmup_poly_equals_the_decay_of_the_lars_paper() -> None:
    overrides = ("schedule=warmup_poly", "schedule.warmup_steps=4", "schedule.warmup_epochs=null")
    got = factors(*overrides, steps=24)
    assert got[3] == 1.0
    assert got[4:] == pytest.approx([(1 - step / 20) ** 2 for step in range(20)])


def test_warmup_longer_than_the_training_is_an_error() -> None:
    with pytest.raises(UserError, match=r"schedule\.warmup_epochs=10.* 50 steps of warm-up, but the training has 40"):
        factors("schedule=warmup_cosine", steps=40)


def test_tvlars_s_delay_is_in_epochs_and_gamma_min_auto_depends_on_the_batch() -> None:
    config = configuration(
        "optimizer=tvlars", "optimizer.delay_epochs=3", "optimizer.gamma_min=auto", "batch_size=1024"
    )
    optimizer = build_optimizer(config, nn.Linear(2, 2), steps_per_epoch=7)
    assert isinstance(optimizer, optim.TVLARS)
    assert optimizer.param_groups[0]["delay"] == 21
    assert optimizer.param_groups[0]["gamma_min"] == pytest.approx(0.004)


def test_lambda_per_step_and_per_training_are_different_runs_and_exclude_each_other() -> None:
    default, relative = (
        configuration("optimizer=tvlars"),
        configuration("optimizer=tvlars", "optimizer.lmbda_relative=10"),
    )
    given = configuration("optimizer=tvlars", "optimizer.lmbda=1e-3")
    assert identity(default) == identity(relative) != identity(given)
    validate(given)
    both = configuration("optimizer=tvlars", "optimizer.lmbda=1e-3", "optimizer.lmbda_relative=5")
    with pytest.raises(UserError, match=r"^optimizer.lmbda=0.001 and optimizer.lmbda_relative=5: only one may be set"):
        validate(both)
    with pytest.raises(UserError, match=r"optimizer.lmbda_relative=-1"):
        validate(configuration("optimizer=tvlars", "optimizer.lmbda_relative=-1"))


NO_DELAY = ("optimizer.delay_epochs=0", "optimizer.gamma_min=0")


@pytest.mark.parametrize("alpha", [1, 0.1])
def test_a_relative_lambda_is_one_schedule_at_every_length(alpha: float) -> None:
    """At the same part of the training, phi is the same; the exponent rises from 0 to the given range."""
    config = configuration("optimizer=tvlars", "optimizer.lmbda_relative=4", f"optimizer.alpha={alpha}", *NO_DELAY)
    for steps in (20, 1000, 60_000):
        optimizer = build_optimizer(config, nn.Linear(2, 2), steps_per_epoch=7, steps=steps)
        assert isinstance(optimizer, optim.TVLARS)
        for part in (0, 0.25, 0.5, 1):
            assert optimizer.phi(part * steps) == pytest.approx(1 / (alpha + math.exp(4 * part)))


@pytest.mark.parametrize(("mode", "steps"), [((), 20), (("mode=bt", "mode.projector=[8,8]"), 20)])
def test_a_run_takes_the_relative_lambda_of_its_own_length(tmp_path: Path, mode: tuple[str, ...], steps: int) -> None:
    """The length of mode=bt is that of pre-training."""
    config = configuration(*TINY, *mode, "optimizer=tvlars", "optimizer.lmbda_relative=3", "epochs=5")
    with Console(tmp_path / "log.txt", speaking=False) as console:
        phase = set_up(config, RunFolder(tmp_path), 0, 1, torch.device("cpu"), console, None)
    assert phase.training.optimizer.param_groups[0]["lmbda"] == pytest.approx(3 / steps)
    assert gather_facts(phase.run, phase.training, 99)["optimizer_options"]["lmbda"] == pytest.approx(3 / steps)


@pytest.mark.parametrize(
    "name",
    [
        *("lars", "lamb", "tvlars", "tvlars_published", "lamb_published", "sgd", "adam", "adamw", "adagrad", "rmsprop"),
        *("muon", "adamuon", "lion", "novograd", "adan", "radam", "adafactor", "soap", "shampoo", "kron"),
        *("schedulefree_sgd", "schedulefree_adamw"),
    ],
)
def test_every_optimizer_lowers_the_loss_with_its_preset(name: str) -> None:
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


def test_library_optimizers_that_need_more_than_a_gradient_are_errors() -> None:
    for library, name, needed in [
        ("timm", "adahessian", "second derivatives of the loss"),
        ("pytorch_optimizer", "sophiah", "second derivatives of the loss"),
        ("pytorch_optimizer", "alig", "a closure"),
    ]:
        config = configuration("optimizer=soap", f"optimizer.library={library}", f"optimizer.name={name}")
        (problem,) = config.optimizer.problems(config)
        assert problem.startswith(f"optimizer.name={name}: needs {needed}")
    for library, name in [("timm", "fusedsgd"), ("pytorch_optimizer", "adammini"), ("pytorch_optimizer", "demo")]:
        config = configuration("optimizer=soap", f"optimizer.library={library}", f"optimizer.name={name}")
        with pytest.raises(UserError, match=f"optimizer.name={name}: "):
            build_optimizer(config, small_network(), steps_per_epoch=1)


def test_optimizers_of_pytorch_optimizer_by_name() -> None:
    model = small_network()
    config = configuration(
        "optimizer=soap", "optimizer.lr=0.003", "+optimizer.options.betas=[0.8,0.9]", "optimizer.lr_1d=0.1"
    )
    optimizer = build_optimizer(config, model, steps_per_epoch=1)
    assert type(optimizer).__name__ == "SOAP"
    many, few = optimizer.param_groups
    assert (tuple(many["betas"]), many["lr"], many["weight_decay"]) == ((0.8, 0.9), 0.003, 0.01)
    assert (tuple(few["betas"]), few["lr"], few["weight_decay"]) == ((0.8, 0.9), 0.1, 0)
    assert [p.ndim for group in (many, few) for p in group["params"]] == [2, 2, 1, 1, 1, 1]
    with pytest.raises(UserError, match=r"pytorch_optimizer has no such optimizer.*did you mean soap"):
        build_optimizer(configuration("optimizer=soap", "optimizer.name=soapp"), model, steps_per_epoch=1)
    with pytest.raises(UserError, match=r"optimizer.options.beta=1: soap has no such option;.*did you mean betas"):
        build_optimizer(configuration("optimizer=soap", "+optimizer.options.beta=1"), model, steps_per_epoch=1)


def test_published_lamb_has_no_bias_correction_and_adapts_everything() -> None:
    group = build_optimizer(configuration("optimizer=lamb_published"), nn.Linear(2, 2), 1).param_groups[0]
    assert (group["bias_correction"], group["norm_clip"], group["adapt_1d"], group["decay_1d"]) == (
        False,
        10,
        True,
        True,
    )


# -- a separate learning rate for biases and norm parameters

LR_1D = ("optimizer.lr=0.05", "optimizer.lr_1d=0.008", "batch_size=512", "lr_scaling.rule=linear")  # doubles both
ONE_LR = "optimizer.lr_1d_ratio=null"


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def after_steps(*overrides: str, steps: int = 1) -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer]:
    """Return the parameters after ``steps`` steps, and the optimizer; two fixed batches alternate."""
    model = small_network()
    optimizer = build_optimizer(configuration(*overrides), model, steps_per_epoch=1)
    inputs, targets = torch.randn(2, 32, 6), torch.randn(2, 32, 3)
    for step in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs[step % 2]), targets[step % 2]).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, optimizer


@pytest.mark.parametrize(
    "optimizer",
    [["optimizer=lars"], ["optimizer=tvlars"], ["optimizer=lamb"], ["optimizer=sgd"], ["optimizer=adamw"],
     ["optimizer=lars", "optimizer.adapt_1d=true", "optimizer.decay_1d=true"],
     ["optimizer=timm", "optimizer.name=lion"], ["optimizer=timm", "optimizer.name=adamw"]],
    ids=lambda overrides: "-".join(overrides),
)  # fmt: skip
def test_biases_and_norm_parameters_step_with_their_own_learning_rate(optimizer: list[str]) -> None:
    """They step as if all parameters had ``lr_1d``, and weights as if all had ``lr``."""
    got, with_groups = after_steps(*optimizer, *LR_1D)
    assert [group["lr"] for group in with_groups.param_groups] == pytest.approx([0.1, 0.016])
    many, few = (after_steps(*optimizer, f"optimizer.lr={lr}", ONE_LR)[0] for lr in (0.1, 0.016))
    before = dict(small_network().named_parameters())
    for name, parameter in got.items():
        torch.testing.assert_close(parameter, (few if parameter.ndim == 1 else many)[name], rtol=1e-6, atol=1e-8)
        assert not torch.allclose(parameter, (many if parameter.ndim == 1 else few)[name], rtol=1e-4, atol=1e-6)
        assert not torch.equal(parameter, before[name])


def test_sgd_and_lars_with_lr_1d_equal_a_step_by_hand() -> None:
    model = small_network()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    inputs, targets = torch.randn(2, 32, 6), torch.randn(2, 32, 3)  # as in after_steps
    nn.functional.mse_loss(model(inputs[0]), targets[0]).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    sgd, _ = after_steps("optimizer=sgd", *LR_1D, "optimizer.weight_decay=0.1")
    lars, _ = after_steps("optimizer=lars", *LR_1D, "optimizer.weight_decay=0.1")
    for name, weight in before.items():
        gradient = gradients[name]
        assert gradient is not None
        decayed = gradient + 0.1 * weight
        lr = 0.1 if weight.ndim > 1 else 0.016
        torch.testing.assert_close(sgd[name], weight - lr * decayed)
        ratio = 0.001 * weight.norm() / decayed.norm() if weight.ndim > 1 else 1.0
        torch.testing.assert_close(lars[name], weight - lr * ratio * (decayed if weight.ndim > 1 else gradient))


@pytest.mark.parametrize("optimizer", ["lars", "lamb", "sgd", "adam", "adamw", "adagrad", "rmsprop"])
def test_lr_1d_0_leaves_biases_unchanged(optimizer: str) -> None:
    got, _ = after_steps(f"optimizer={optimizer}", "optimizer.lr=0.1", "optimizer.lr_1d=0", steps=3)
    for name, parameter in small_network().named_parameters():
        assert torch.equal(got[name], parameter) == (parameter.ndim == 1)


@pytest.mark.parametrize("name", ["lars", "tvlars", "lamb", "sgd", "adam", "adamw", "adagrad", "rmsprop"])
def test_lr_1d_equal_to_lr_changes_nothing(name: str) -> None:
    """Several steps also cover the optimizer's state of each parameter."""
    adapted = [f"optimizer.{key}_1d=true" for key in ("adapt", "decay") if name in ("lars", "tvlars", "lamb")]
    got, split = after_steps(f"optimizer={name}", *adapted, "optimizer.lr=0.02", "optimizer.lr_1d=0.02", steps=4)
    expected, _ = after_steps(f"optimizer={name}", *adapted, "optimizer.lr=0.02", ONE_LR, steps=4)
    assert len(split.param_groups) == 2
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["lars", "tvlars", "clars", "lamb"])
def test_layers_keep_their_names_with_lr_1d(name: str) -> None:
    every = [name for name, _ in small_network().named_parameters()]
    for adapted, layers in ((False, ["0.weight", "3.weight"]), (True, every)):
        config = configuration(f"optimizer={name}", *LR_1D, f"optimizer.adapt_1d={adapted}")
        optimizer = build_optimizer(config, small_network(), steps_per_epoch=1)
        assert isinstance(optimizer, optim.LARS | optim.TVLARS | optim.CLARS | optim.LAMB)
        assert sorted(optimizer.layer_names) == sorted(layers)


def test_tvlars_s_phi_counts_the_same_steps_in_both_groups() -> None:
    """Biases are adapted too, and phi falls by half in these steps."""
    options = ("optimizer=tvlars", "optimizer.adapt_1d=true", "optimizer.lmbda=1", "optimizer.delay_epochs=2")
    got, optimizer = after_steps(*options, "optimizer.lr=2", "optimizer.lr_1d=2", steps=4)
    expected, whole = after_steps(*options, "optimizer.lr=2", ONE_LR, steps=4)
    assert isinstance(optimizer, optim.TVLARS)
    assert isinstance(whole, optim.TVLARS)
    assert [group["step"] for group in optimizer.param_groups] == [4, 4]
    assert optimizer.phi(1) > 2 * optimizer.phi(4)
    torch.testing.assert_close(got, expected)
    ratios = (
        dict(zip(o.layer_names, o.layer_stats()["trust_ratio"].tolist(), strict=True)) for o in (optimizer, whole)
    )
    assert next(ratios) == pytest.approx(next(ratios), rel=1e-5)


def test_the_schedule_multiplies_both_learning_rates() -> None:
    config = configuration(*LR_1D, "schedule=warmup_cosine", "schedule.warmup_epochs=null", "schedule.warmup_steps=4")
    optimizer = build_optimizer(config, small_network(), steps_per_epoch=1)
    factor = config.schedule.factor(12, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    seen = []
    for _ in range(12):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert seen[0] == pytest.approx([0.1 / 4, 0.016 / 4])
    assert seen[4] == pytest.approx([0.1, 0.016])
    assert seen == [pytest.approx([0.1 * factor(step), 0.016 * factor(step)]) for step in range(12)]


def test_lr_1d_follows_the_scaling_rule() -> None:
    overrides = ("optimizer=adamw", "optimizer.lr=0.002", "optimizer.lr_1d=0.0005", "batch_size=1024")
    for rule in (["none"], ["linear"], ["sqrt"], ["surge", "lr_scaling.noise_scale=1000"]):
        config = configuration(*overrides, f"lr_scaling.rule={rule[0]}", *rule[1:])
        groups = build_optimizer(config, small_network(), steps_per_epoch=1).param_groups
        assert groups[0]["lr"] == resolved_lr(config)
        assert groups[1]["lr"] == pytest.approx(resolved_lr(config) / 4)
        assert {parameter.ndim for parameter in groups[0]["params"]} == {2}
        assert {parameter.ndim for parameter in groups[1]["params"]} == {1}


def test_lr_1d_ratio_is_a_part_of_the_scaled_learning_rate() -> None:
    scaled = ("optimizer=lars", "optimizer.lr=2", "batch_size=1024", "lr_scaling.rule=linear")
    config = configuration(*scaled, "optimizer.lr_1d_ratio=0.024")
    groups = build_optimizer(config, small_network(), steps_per_epoch=1).param_groups
    assert [group["lr"] for group in groups] == pytest.approx([8, 0.192])


def test_lr_1d_takes_the_place_of_a_ratio() -> None:
    config = configuration("optimizer=lars", "optimizer.lr=2", "optimizer.lr_1d=0.1")
    groups = build_optimizer(config, small_network(), steps_per_epoch=1).param_groups
    assert [group["lr"] for group in groups] == [2, 0.1]
    assert identity(config) == identity(
        configuration("optimizer=lars", "optimizer.lr=2", "optimizer.lr_1d=0.1", "optimizer.lr_1d_ratio=0.5")
    )


def test_lr_1d_without_biases_makes_no_second_group() -> None:
    config = configuration("optimizer=lars", "optimizer.lr_1d=0.1")
    optimizer = build_optimizer(config, nn.Linear(3, 2, bias=False), steps_per_epoch=1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]
