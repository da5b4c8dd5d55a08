"""Sharpness of a small network against its dense Hessian, and the preconditioner against real optimizer steps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, configuration
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from largebatch.instruments.fixed_loss import FixedLoss
from largebatch.instruments.preconditioner import inverse_preconditioner
from largebatch.instruments.sharpness import PROBES, sharpness
from largebatch.machine.memory import is_out_of_memory
from largebatch.optim.measured import MeasuredOptimizer
from largebatch.training.optimization import build_optimizer

IMAGES = torch.randn(24, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 3, (24,), generator=torch.Generator().manual_seed(2))
# Optimizers whose step is w -= lr * D^-1 * g: without momentum and weight decay.
PLAIN = [
    ("sgd", "momentum=0", "nesterov=false", "weight_decay=0"),
    ("sgd", "momentum=0", "nesterov=false", "weight_decay=0", "lr_1d=0.03"),
    ("lars", "momentum=0", "weight_decay=0"),
    ("lars", "momentum=0", "weight_decay=0", "max_ratio=1", "larc=true"),
    ("tvlars", "momentum=0", "weight_decay=0", "lmbda=0.5"),
    ("clars", "momentum=0", "weight_decay=0"),
    ("lamb", "betas=[0.0,0.9]", "weight_decay=0"),
    ("lamb", "betas=[0.0,0.9]", "weight_decay=0", "bias_correction=false", "max_ratio=1"),
    ("adam", "betas=[0.0,0.9]"),
    ("adamw", "betas=[0.0,0.9]", "weight_decay=0", "lr_1d=0.03"),
    ("adam", "betas=[0.0,0.5]", "amsgrad=true"),
    ("rmsprop",),
    ("rmsprop", "centered=true"),
    ("adagrad", "lr_decay=0.3"),
]


def network(*more: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), *more, nn.Linear(6, 3))


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def fixed(model: nn.Module, size: int = 24) -> FixedLoss:
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return FixedLoss(model, names, loss_of, IMAGES, LABELS, len(LABELS), size)


def dense_hessian(model: nn.Module) -> Tensor:
    """Return the Hessian of the loss over all images by all parameters, fp64 [n, n]."""
    parameters = {name: p.detach().double() for name, p in model.named_parameters()}

    def loss(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [p.numel() for p in parameters.values()])
        shaped = {name: part.view(p.shape) for part, (name, p) in zip(parts, parameters.items(), strict=True)}
        logits: Tensor = torch.func.functional_call(model.double(), shaped, (IMAGES.double(),))
        return F.cross_entropy(logits, LABELS)

    found: Tensor = torch.autograd.functional.hessian(loss, torch.cat([p.flatten() for p in parameters.values()]))
    model.float()
    return found


def optimizer_of(model: nn.Module, name: str, *options: str) -> torch.optim.Optimizer:
    config = configuration(*TINY, f"optimizer={name}", *(f"optimizer.{one}" for one in options))
    return build_optimizer(config, model, 4, 40)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Take a step. Return the gradients."""
    optimizer.zero_grad()
    loss_of(model, IMAGES, LABELS).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    if isinstance(optimizer, MeasuredOptimizer):
        optimizer.give({p: 2 * p.grad.norm() for p in optimizer.layers if p.grad is not None})
    optimizer.step()
    return gradients


@pytest.mark.parametrize("options", PLAIN, ids=" ".join)
def test_the_preconditioner_is_what_the_step_multiplies_the_gradient_by(options: tuple[str, ...]) -> None:
    model = network()
    optimizer = optimizer_of(model, *options)
    parameters = list(model.parameters())
    assert inverse_preconditioner(optimizer, parameters) is None or options[0] == "sgd"  # before the first step
    schedule = LambdaLR(optimizer, lambda step: 0.5**step)
    for _ in range(3):
        before = [p.detach().clone() for p in parameters]
        lr = optimizer.param_groups[0]["lr"]
        gradients = stepped(model, optimizer)
        schedule.step()
    moved = torch.cat([(old - p.detach()).flatten() for old, p in zip(before, parameters, strict=True)])
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    found = inverse_preconditioner(optimizer, parameters)
    assert found is not None
    torch.testing.assert_close((lr * found * flat).float(), moved, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["vrlars", "vrlamb", "custom"])
def test_an_optimizer_without_a_known_preconditioner_has_none(name: str) -> None:
    model = network()
    assert inverse_preconditioner(optimizer_of(model, name), list(model.parameters())) is None


@pytest.mark.parametrize("options", [("adamw",), ("lamb",), ("lars",), ("sgd", "lr_1d=0.03")], ids=" ".join)
def test_the_numbers_are_those_of_the_dense_hessian(options: tuple[str, ...]) -> None:
    model = network()
    optimizer = optimizer_of(model, *options)
    for _ in range(5):
        stepped(model, optimizer)
    hessian = dense_hessian(model)
    inverse = inverse_preconditioner(optimizer, list(model.parameters()))
    assert inverse is not None
    row = sharpness(fixed(model), inverse, seed=0)
    assert row["sharpness/eigenvalue"] == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=0.01)
    expected = torch.linalg.eigvals(inverse[:, None] * hessian).real.max().item()
    assert row["sharpness/preconditioned"] == pytest.approx(expected, rel=0.01)
    assert abs(row["sharpness/trace"] - hessian.trace().item()) < 3 * row["sharpness/trace_se"]
    variance = 2 * (hessian.square().sum() - hessian.diagonal().square().sum())  # of z H z
    assert row["sharpness/trace_se"] == pytest.approx(math.sqrt(variance / PROBES), rel=0.7)


def test_without_a_preconditioner_its_eigenvalue_is_left_out() -> None:
    assert "sharpness/preconditioned" not in sharpness(fixed(network()), None, seed=0)
    plain = sharpness(fixed(network()), torch.ones(60 + 9, dtype=torch.float64), seed=0)
    assert plain["sharpness/preconditioned"] == plain["sharpness/eigenvalue"]


def test_the_rises_are_those_of_one_step_of_ascent() -> None:
    model = network()
    row = sharpness(fixed(model), None, seed=0)
    before = [p.detach().clone() for p in model.parameters()]
    gradients = torch.autograd.grad(loss_of(model, IMAGES, LABELS), list(model.parameters()))

    def rise(steps: list[Tensor]) -> float:
        with torch.no_grad():
            start = loss_of(model, IMAGES, LABELS)
            for p, step in zip(model.parameters(), steps, strict=True):
                p += step
            end = loss_of(model, IMAGES, LABELS)
            for p, old in zip(model.parameters(), before, strict=True):
                p.copy_(old)
        return (end - start).item()

    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    assert row["sharpness/sam"] == pytest.approx(rise([0.05 * g / norm for g in gradients]), rel=1e-3)
    scaled = [w.abs() * g for w, g in zip(before, gradients, strict=True)]  # T g; the step is r T (T g / |T g|)
    norm = math.sqrt(sum(g.square().sum().item() for g in scaled))
    steps = [0.5 * w.abs() * g / norm for w, g in zip(before, scaled, strict=True)]
    assert row["sharpness/asam"] == pytest.approx(rise(steps), rel=1e-3)
    assert 0 < row["sharpness/sam"] < row["sharpness/asam"]


def test_parts_of_the_batch_add_up() -> None:
    whole, parts = sharpness(fixed(network()), None, seed=0), sharpness(fixed(network(), size=7), None, seed=0)
    assert parts == pytest.approx(whole, rel=1e-3)


def test_a_part_that_runs_out_of_memory_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def scarce(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        sizes.append(len(labels))
        if len(labels) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss_of(model, images, labels)

    model = network()
    names = [name for name, _ in model.named_parameters()]
    loss = FixedLoss(model, names, scarce, IMAGES, LABELS, 24, 24)
    assert loss.value() == pytest.approx(fixed(model).value())
    loss.gradient()
    assert sizes == [24, 12, *[6] * 8]
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))


def test_batch_norm_and_dropout_are_frozen() -> None:
    trained = network(nn.BatchNorm1d(6), nn.Dropout(0.5)).train()
    trained(IMAGES)
    loss = fixed(network(nn.BatchNorm1d(6), nn.Dropout(0.5)).train())
    loss.move_to(trained)
    state, random = {k: v.clone() for k, v in trained.state_dict().items()}, torch.get_rng_state()
    expected = loss_of(trained.eval(), IMAGES, LABELS).item()
    assert loss.value() == pytest.approx(expected, rel=1e-6)
    sharpness(loss, None, seed=0)
    assert loss.value() == pytest.approx(expected, rel=1e-6)
    assert all(torch.equal(tensor, state[name]) for name, tensor in trained.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_frozen_parameters_take_no_part() -> None:
    model = network()
    model[0].requires_grad_(False)
    loss = fixed(model)
    assert loss.length == 12 + 21
    hessian = dense_hessian(model)[36:, 36:]
    found = sharpness(loss, None, seed=0)["sharpness/eigenvalue"]
    assert found == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=0.01)
