"""Directions have the norms of the filters, and slices the values of the loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from largebatch.instruments.fixed_loss import FixedLoss
from largebatch.instruments.slices import filter_normalised, loss_slice

AT = [-1.0, -0.5, 0.0, 0.5, 1.0]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_each_filter_of_a_direction_has_the_norm_of_the_weight_s() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4, 5))
    parameters = list(network.parameters())
    direction = filter_normalised(parameters, seeded(0))
    parts = torch.split(direction, [p.numel() for p in parameters])
    for part, weight in zip(parts, parameters, strict=True):
        if weight.ndim > 1:
            expected = weight.detach().double().flatten(1).norm(dim=1)
            torch.testing.assert_close(part.view(len(weight), -1).norm(dim=1), expected)
        else:
            assert not part.any()
    assert torch.equal(direction, filter_normalised(parameters, seeded(0)))
    cosine = torch.cosine_similarity(direction, filter_normalised(parameters, seeded(1)), dim=0)
    assert abs(cosine) < 0.5


def test_a_slice_of_a_quadratic_is_a_parabola() -> None:
    """Points far away are None: their loss isn't finite in fp32."""
    network = nn.Linear(3, 2, bias=False)

    def half_square(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return model(images).square().sum() / 2

    images, start = torch.eye(3), network.weight.detach().clone()
    loss = FixedLoss(network, ["weight"], half_square, images, torch.zeros(3, dtype=torch.int64), 3, 3)
    directions = [filter_normalised(list(network.parameters()), seeded(seed)) for seed in (0, 1)]
    first, second = (direction.view(2, 3) for direction in directions)
    (line,) = loss_slice(loss, AT, directions[0])
    assert line == pytest.approx([((start + x * first).square().sum() / 2).item() for x in AT], rel=1e-5)
    plane = loss_slice(loss, AT, *directions)
    for y, row in zip(AT, plane, strict=True):
        expected = [((start + x * first + y * second).square().sum() / 2).item() for x in AT]
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert torch.equal(network.weight, start)
    assert loss_slice(loss, [-1e30, 0.0], directions[0]) == [[None, pytest.approx(plane[2][2])]]
