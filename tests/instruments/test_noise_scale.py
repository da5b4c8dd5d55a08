"""The estimator of the gradient noise scale against cases with a known value."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from largebatch.instruments.noise_scale import LEAST_STEPS, NoiseScale, two_batch

IMAGES, MICRO_BATCHES = 16, 4  # images of a micro-batch, micro-batches of a step


def squares_of(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Return squared norms [...]: the mean over micro-batches, and that of their mean gradient [..., groups, n]."""
    return gradients.square().sum(-1).mean(-1), gradients.mean(-2).square().sum(-1)


def measured(mean: Tensor, deviation: Tensor, runs: int, steps: int, memory: int, seed: int) -> NoiseScale:
    """Return the noise scales of ``runs`` independent runs with Gaussian gradients."""
    generator = torch.Generator().manual_seed(seed)
    scales = NoiseScale(runs, memory)
    for _ in range(steps):
        noise = torch.randn(runs, MICRO_BATCHES, len(mean), generator=generator, dtype=torch.float64)
        gradients = mean + deviation / math.sqrt(IMAGES) * noise
        scales.add(two_batch(*squares_of(gradients), IMAGES, MICRO_BATCHES * IMAGES))
    return scales


@pytest.mark.parametrize("signal", [1.0, 0.3, 0.1])
@pytest.mark.parametrize(("steps", "memory"), [(20, 100), (200, 1000), (150, 50)])
def test_intervals_cover_the_true_noise_scale(steps: int, memory: int, signal: float) -> None:
    """90 % intervals cover 87 to 93 %, for short and long means, and for gradients that are mostly noise."""
    deviation = torch.linspace(0.5, 2.0, 12, dtype=torch.float64)
    mean = torch.full((12,), signal, dtype=torch.float64)
    true = float(deviation.square().sum() / mean.square().sum())
    found = measured(mean, deviation, 2000, steps, memory, seed=1).interval()
    assert found is not None
    covered = float(((found.low <= true) & (true <= found.high)).double().mean())
    assert 0.87 <= covered <= 0.93
    assert bool((found.low <= found.high).all())


@pytest.mark.parametrize(("dimensions", "noise"), [(20, 0.5), (8, 1.0)])
def test_the_estimate_is_that_of_linear_regression(dimensions: int, noise: float) -> None:
    """Compare with ``tr(S) / |G|^2`` of least squares with Gaussian inputs and targets.

    With inputs x ~ N(0, I), the error d of the weights and targets' noise of variance v, an image's gradient is
    ``x (x . d - e)``: ``G = d`` and ``tr(S) = (n + 1) |d|^2 + n v``.
    """
    generator = torch.Generator().manual_seed(2)
    error = torch.full((dimensions,), 1 / math.sqrt(dimensions), dtype=torch.float64)
    true = dimensions + 1 + dimensions * noise**2
    scales = NoiseScale(1, memory=1000)
    for _ in range(200):
        inputs = torch.randn(16, 64, dimensions, generator=generator, dtype=torch.float64)
        residuals = inputs @ error - noise * torch.randn(16, 64, generator=generator, dtype=torch.float64)
        gradients = (inputs * residuals[..., None]).mean(-2)
        small, large = squares_of(gradients)
        scales.add(two_batch(small[None], large[None], 64, 1024))
    found = scales.interval()
    assert found is not None
    assert found.scale.item() == pytest.approx(true, rel=0.05)
    assert found.low.item() < true < found.high.item()


def test_the_estimate_has_no_bias() -> None:
    """The plain ratio of means is over 1 % too high here."""
    mean, deviation = torch.full((6,), 0.1, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    scales = measured(mean, deviation, 8000, 100, 1000, seed=3)
    found = scales.interval()
    assert found is not None
    plain = scales.state()["mean"]
    assert float((plain[:, 0] / plain[:, 1]).mean()) > 100 * 1.01
    assert float(found.scale.mean()) == pytest.approx(100, rel=0.01)


def test_without_a_gradient_there_is_no_upper_limit() -> None:
    """Gradients of pure noise have an infinite noise scale, which most intervals contain."""
    zero, one = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    found = measured(zero, one, 2000, 50, 100, seed=4).interval()
    assert found is not None
    assert 0.92 <= float(found.high.isinf().double().mean()) <= 0.98  # one side of a 90 % interval
    assert bool((found.low[found.high.isinf()] > 0).any())
    assert not bool(found.low.isnan().any() or found.high.isnan().any())


def test_a_parameter_without_gradient_has_no_estimate() -> None:
    scales = NoiseScale(1)
    for _ in range(LEAST_STEPS):
        scales.add(torch.zeros(1, 2, dtype=torch.float64))
    found = scales.interval()
    assert found is not None
    assert found.scale.isnan().all()
    assert (found.low.item(), found.high.item()) == (0.0, math.inf)


def test_few_steps_give_no_interval_and_a_step_that_is_not_finite_does_not_count() -> None:
    scales = NoiseScale(1)
    for step in range(LEAST_STEPS):
        assert scales.interval() is None
        scales.add(torch.tensor([[torch.nan, 1.0]], dtype=torch.float64))
        scales.add(torch.tensor([[100.0 + step, 1.0]], dtype=torch.float64))
    assert scales.steps == LEAST_STEPS
    assert scales.interval() is not None


def test_a_loaded_state_continues_exactly() -> None:
    mean, deviation = torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    whole, loaded = measured(mean, deviation, 2, 30, 10, seed=5), NoiseScale(2, 10)
    loaded.load(whole.state())
    for scales in (whole, loaded):
        scales.add(torch.full((2, 2), 2.0, dtype=torch.float64))
    first, second = whole.interval(), loaded.interval()
    assert first is not None
    assert second is not None
    assert torch.equal(first.scale, second.scale)
    assert torch.equal(first.high, second.high)
