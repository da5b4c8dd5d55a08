"""The schedule phi of TVLARS's trust ratio."""

import itertools
import math

import numpy as np
import pytest
import torch

from largebatch.optim import TVLARS


def optimizer(**options):
    return TVLARS([torch.nn.Parameter(torch.ones(2, 2))], lr=1.0, **options)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("lmbda", [0.0, 1e-6, 1e-3, 5e-2, 1.0])
def test_phi_is_the_formula(lmbda, alpha):
    """The reference is in 80-bit floats, in the range in which the formula as written doesn't overflow."""
    tvlars = optimizer(lmbda=lmbda, alpha=alpha, delay=40, gamma_min=0.004)
    for step in (0, 1, 2, 39, 40, 41, 500, 9800):
        exponent = np.longdouble(lmbda) * (step - 40)
        expected = 1 / (np.longdouble(alpha) + np.exp(exponent)) + np.longdouble(0.004)
        assert tvlars.phi(step) == pytest.approx(float(expected), rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float32])
def test_phi_of_a_tensor_is_phi_of_each_step(dtype):
    tvlars = optimizer(lmbda=0.05, alpha=0.1, delay=300, gamma_min=0.01)
    steps = torch.arange(0, 900, 7).view(3, -1)
    values = tvlars.phi(steps.to(dtype))
    assert values.shape == steps.shape
    assert values.dtype == (torch.float32 if dtype == torch.float32 else torch.float64)
    expected = [[tvlars.phi(step) for step in row] for row in steps.tolist()]
    assert values.tolist() == [pytest.approx(row, rel=1e-5 if dtype == torch.float32 else 1e-14) for row in expected]


@pytest.mark.parametrize("options", [{"lmbda": 1.0}, {"lmbda": 1e300}, {"lmbda": 1.0, "alpha": 0.0}, {"lmbda": 0.0}])
def test_phi_of_a_tensor_is_safe_at_any_time(options):
    tvlars = optimizer(delay=10**9, gamma_min=0.25, **options)
    values = tvlars.phi(torch.tensor([1.0, 10**9, 10**12], dtype=torch.float64))
    assert values.isfinite().all()
    assert values.tolist() == pytest.approx([tvlars.phi(step) for step in (1, 10**9, 10**12)], rel=1e-12)


def test_phi_is_safe_at_any_time():
    assert optimizer(lmbda=1.0, gamma_min=0.25).phi(10**15) == 0.25
    assert optimizer(lmbda=1e300, gamma_min=0.25).phi(10**15) == 0.25
    assert optimizer(lmbda=1.0, alpha=0.1, delay=10**15).phi(1) == 10.0
    assert optimizer(lmbda=1e300, alpha=0.1, delay=10**15).phi(1) == 10.0
    assert optimizer(lmbda=1.0).phi(700) == pytest.approx(math.exp(-700), rel=1e-12)
    assert optimizer(lmbda=0.0, alpha=1.0, delay=10**15).phi(10**15) == 0.5
    assert math.isfinite(optimizer(lmbda=1.0, alpha=0.0, delay=10**15).phi(1))


def test_phi_falls_from_its_bound_through_its_midpoint_to_its_floor():
    lmbda, alpha, delay, gamma_min = 0.05, 0.1, 300, 0.01
    phi = [optimizer(lmbda=lmbda, alpha=alpha, delay=delay, gamma_min=gamma_min).phi(step) for step in range(900)]
    assert all(later < earlier for earlier, later in itertools.pairwise(phi))
    assert phi[0] == pytest.approx(gamma_min + 1 / (alpha + math.exp(-lmbda * delay)), rel=1e-12)
    assert gamma_min < phi[-1] < gamma_min + 1e-12
    midpoint = delay + math.log(alpha) / lmbda
    at_midpoint = optimizer(lmbda=lmbda, alpha=alpha, delay=delay, gamma_min=gamma_min).phi(midpoint)
    assert at_midpoint == pytest.approx(1 / (2 * alpha) + gamma_min, rel=1e-12)


def test_the_published_decay():
    """Values of the released program on CIFAR-10 at batch 512: 98 steps an epoch, alpha 0.1, no delay, no floor."""
    published = optimizer(lmbda=1e-3, alpha=0.1)
    assert published.phi(0) == pytest.approx(0.909, abs=5e-4)
    assert published.phi(980) == pytest.approx(0.36, abs=5e-3)
    assert published.phi(9800) == pytest.approx(5.5e-5, rel=1e-2)


def test_phi_does_not_depend_on_the_steps_taken():
    tvlars = optimizer(lmbda=0.1)
    before = [tvlars.phi(step) for step in range(10)]
    tvlars.param_groups[0]["params"][0].grad = torch.ones(2, 2)
    for _ in range(5):
        tvlars.step()
    assert [tvlars.phi(step) for step in range(10)] == before


def test_the_trust_ratio_contains_phi_with_t_1_at_the_first_step():
    weight = torch.nn.Parameter(torch.eye(2, dtype=torch.float64))
    tvlars = TVLARS([weight], lr=1e-3, momentum=0.0, trust_coefficient=0.5, lmbda=0.3, alpha=0.2, delay=2)
    for t in range(1, 6):
        weight.grad = torch.ones_like(weight)
        expected = 0.5 * tvlars.phi(t) * torch.linalg.vector_norm(weight.detach()).item() / 2
        tvlars.step()
        assert tvlars.layer_stats()["trust_ratio"].tolist() == [pytest.approx(expected, rel=1e-6)]
