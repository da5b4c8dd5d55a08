"""The estimator of the gradient noise scale against cases with a known value."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from largebatch.instruments.noise_scale import LEAST_STEPS, PairedMeans, two_batch

IMAGES, MICRO_BATCHES = 16, 4  # images of a micro-batch, micro-batches of a step


def squares_of(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Return squared norms [...]: the mean over micro-batches, and that of their mean gradient [..., groups, n]."""
    return gradients.square().sum(-1).mean(-1), gradients.mean(-2).square().sum(-1)


def measured(mean: Tensor, deviation: Tensor, runs: int, steps: int, memory: int, seed: int) -> PairedMeans:
    """Return the noise scales of ``runs`` independent runs with Gaussian gradients."""
    generator = torch.Generator().manual_seed(seed)
    scales = PairedMeans(runs, memory)
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
    found = measured(mean, deviation, 2000, steps, memory, seed=1).noise_scales()
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
    scales = PairedMeans(1, memory=1000)
    for _ in range(200):
        inputs = torch.randn(16, 64, dimensions, generator=generator, dtype=torch.float64)
        residuals = inputs @ error - noise * torch.randn(16, 64, generator=generator, dtype=torch.float64)
        gradients = (inputs * residuals[..., None]).mean(-2)
        small, large = squares_of(gradients)
        scales.add(two_batch(small[None], large[None], 64, 1024))
    found = scales.noise_scales()
    assert found is not None
    assert found.value.item() == pytest.approx(true, rel=0.05)
    assert scales.numerators.item() == pytest.approx(true, rel=0.05)  # tr(S), because |G|^2 is 1
    assert found.low.item() < true < found.high.item()


def test_the_estimate_has_no_bias() -> None:
    """The plain ratio of means is over 1 % too high here."""
    mean, deviation = torch.full((6,), 0.1, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    scales = measured(mean, deviation, 8000, 100, 1000, seed=3)
    found = scales.noise_scales()
    assert found is not None
    plain = scales.state()["mean"]
    assert float((plain[:, 0] / plain[:, 1]).mean()) > 100 * 1.01
    assert float(found.value.mean()) == pytest.approx(100, rel=0.01)


def test_without_a_gradient_there_is_no_upper_limit() -> None:
    """Gradients of pure noise have an infinite noise scale, which most intervals contain."""
    zero, one = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    found = measured(zero, one, 2000, 50, 100, seed=4).noise_scales()
    assert found is not None
    assert 0.92 <= float(found.high.isinf().double().mean()) <= 0.98  # one side of a 90 % interval
    assert bool((found.low[found.high.isinf()] > 0).any())
    assert not bool(found.low.isnan().any() or found.high.isnan().any())


def test_a_parameter_without_gradient_has_no_estimate() -> None:
    scales = PairedMeans(1)
    for _ in range(LEAST_STEPS):
        scales.add(torch.zeros(1, 2, dtype=torch.float64))
    found = scales.noise_scales()
    assert found is not None
    assert found.value.isnan().all()
    assert (found.low.item(), found.high.item()) == (0.0, math.inf)


def test_few_steps_give_no_interval_and_a_step_that_is_not_finite_does_not_count() -> None:
    scales = PairedMeans(1)
    for step in range(LEAST_STEPS):
        assert scales.noise_scales() is None
        scales.add(torch.tensor([[torch.nan, 1.0]], dtype=torch.float64))
        scales.add(torch.tensor([[100.0 + step, 1.0]], dtype=torch.float64))
    assert scales.steps == LEAST_STEPS
    assert scales.noise_scales() is not None


def test_a_loaded_state_continues_exactly() -> None:
    mean, deviation = torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    whole, loaded = measured(mean, deviation, 2, 30, 10, seed=5), PairedMeans(2, 10)
    loaded.load(whole.state())
    for scales in (whole, loaded):
        scales.add(torch.full((2, 2), 2.0, dtype=torch.float64))
    first, second = whole.noise_scales(), loaded.noise_scales()
    assert first is not None
    assert second is not None
    assert torch.equal(first.value, second.value)
    assert torch.equal(first.high, second.high)


def cosines(mean: Tensor, deviation: Tensor, runs: int, steps: int, seed: int) -> PairedMeans:
    """Return the cosines of ``runs`` independent runs whose successive gradients are independent and Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    found = PairedMeans(runs)
    for _ in range(steps):
        first, second = mean + deviation * torch.randn(2, runs, len(mean), generator=generator, dtype=torch.float64)
        found.add(torch.stack([(first * second).sum(-1), first.norm(dim=-1) * second.norm(dim=-1)], dim=-1))
    return found


@pytest.mark.parametrize("signal", [2.0, 0.3, 0.0])
@pytest.mark.parametrize("steps", [15, 60])
def test_intervals_of_the_cosine_cover_its_true_value(steps: int, signal: float) -> None:
    """90 % intervals cover 86 to 94 %. The dot product's mean is |G|^2, and norms are independent."""
    mean, deviation = torch.full((12,), signal, dtype=torch.float64), torch.linspace(0.5, 2, 12, dtype=torch.float64)
    draws = torch.randn(400_000, 12, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    true = float(mean.square().sum() / (mean + deviation * draws).norm(dim=-1).mean() ** 2)
    found = cosines(mean, deviation, 2000, steps, seed=7).cosines()
    assert found is not None
    covered = float(((found.low <= true) & (true <= found.high)).double().mean())
    assert 0.86 <= covered <= 0.94
    assert float(found.value.mean()) == pytest.approx(true, abs=0.01)


def test_at_fixed_weights_the_cosine_follows_from_the_noise_scale() -> None:
    """It is ``1 / (1 + N / B)`` if norms hardly scatter: ``|G|^2`` over ``|G|^2 + tr(S) / B``."""
    mean, deviation = torch.ones(400, dtype=torch.float64), torch.full((400,), 3.0, dtype=torch.float64)
    found = cosines(mean, deviation / math.sqrt(16), 1, 400, seed=8).cosines()
    assert found is not None
    assert found.value.item() == pytest.approx(1 / (1 + 9 / 16), rel=0.01)
