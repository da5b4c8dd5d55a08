"""Both indicators of a collapse, on embeddings with known spread."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from largebatch.modes.features import effective_rank, mean_deviation


def gaussian(n: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def cross(directions: int, width: int, times: int = 1) -> Tensor:
    """Return both ends of orthogonal ``directions`` of length 3, around a point other than 0."""
    turned = torch.linalg.qr(gaussian(width, width).double()).Q[:directions] * 3
    return (torch.cat([turned, -turned]).repeat(times, 1) + gaussian(1, width, seed=1)).float()


def entropy_rank(embeddings: Tensor) -> float:
    matrix = embeddings.double().numpy()
    values = np.linalg.svd(matrix - matrix.mean(0), compute_uv=False)
    shares = [value / values.sum() for value in values if value > 1e-12]
    return math.exp(-sum(share * math.log(share) for share in shares))


@pytest.mark.parametrize("width", [8, 64, 300])
def test_uniformly_distributed_directions_have_a_deviation_of_1(width: int) -> None:
    assert mean_deviation(gaussian(4000, width)) == pytest.approx(1, abs=0.02)


def test_equal_embeddings_have_a_deviation_of_0() -> None:
    assert mean_deviation(gaussian(1, 32).repeat(50, 1)) == pytest.approx(0, abs=1e-6)
    assert mean_deviation(torch.zeros(50, 32)) == 0
    # Lengths don't matter: only directions count.
    assert mean_deviation(gaussian(1, 32) * torch.linspace(1, 9, 50)[:, None]) == pytest.approx(0, abs=1e-6)


def test_deviation_falls_as_a_shared_direction_grows() -> None:
    found = [float(mean_deviation(gaussian(2000, 32) + shared)) for shared in (0.0, 0.5, 1.0, 3.0)]
    assert found == sorted(found, reverse=True)
    # The deviation is about sqrt(1 / (1 + shared ** 2)).
    assert found[2] == pytest.approx(math.sqrt(1 / 2), abs=0.03)
    assert found[3] == pytest.approx(math.sqrt(1 / 10), abs=0.03)


@pytest.mark.parametrize("directions", [1, 2, 5])
@pytest.mark.parametrize(("width", "times"), [(6, 1), (6, 40), (64, 1), (64, 40)])
def test_effective_rank_counts_orthogonal_directions(directions: int, width: int, times: int) -> None:
    assert effective_rank(cross(directions, width, times)) == pytest.approx(directions, rel=1e-4)


@pytest.mark.parametrize(("n", "width"), [(2, 5), (7, 30), (30, 7), (20, 20), (200, 16)])
def test_effective_rank_is_the_entropy_of_the_singular_values(n: int, width: int) -> None:
    embeddings = gaussian(n, width) * torch.linspace(0.1, 2, width) + 5
    got = float(effective_rank(embeddings))
    assert got == pytest.approx(entropy_rank(embeddings), rel=1e-6)
    assert 1 <= got <= min(n - 1, width) + 1e-9


@pytest.mark.parametrize(("n", "width"), [(10, 40), (40, 10), (300, 200)])
def test_embeddings_on_a_line_have_an_effective_rank_of_1(n: int, width: int) -> None:
    """Rounding leaves small values in the many other directions, which must not count."""
    on_a_line = torch.outer(torch.arange(n), torch.arange(1, width + 1)) + torch.arange(width)
    assert effective_rank(on_a_line.float()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("n", "width"), [(1, 4), (7, 30), (30, 7)])
def test_equal_embeddings_have_an_effective_rank_of_0(n: int, width: int) -> None:
    assert effective_rank(gaussian(1, width).repeat(n, 1)) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("n", "width"), [(7, 30), (30, 7)])
def test_effective_rank_of_non_finite_embeddings_is_nan(n: int, width: int, bad: float) -> None:
    embeddings = gaussian(n, width)
    embeddings[3, 2] = bad
    assert math.isnan(effective_rank(embeddings))


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_both_indicators_ignore_the_scale(factor: float) -> None:
    embeddings = gaussian(40, 16) * torch.linspace(0.1, 2, 16) + 0.5
    for indicator in (mean_deviation, effective_rank):
        assert indicator(factor * embeddings) == pytest.approx(float(indicator(embeddings)), rel=1e-5)


def test_effective_rank_ignores_translation_and_rotation() -> None:
    embeddings = gaussian(40, 16) * torch.linspace(0.1, 2, 16)
    turn = torch.linalg.qr(gaussian(16, 16, seed=3)).Q
    for changed in (embeddings + 10, embeddings @ turn):
        assert effective_rank(changed) == pytest.approx(float(effective_rank(embeddings)), rel=1e-5)
