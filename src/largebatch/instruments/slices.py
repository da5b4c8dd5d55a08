"""Slices of the loss along filter-normalised directions (Li et al., arXiv 1712.09913)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from largebatch.instruments.fixed_loss import FixedLoss

Values = list[list[float | None]]  # [points of the second direction, points of the first]


def filter_normalised(parameters: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """Return a random direction, fp64 [n], on the parameters' device.

    Each filter of the direction, a slice of a weight along its first dimension, has the norm of the weight's filter.
    Biases and norm parameters don't move.

    Args:
        parameters: the network's parameters.
        generator: on the CPU.
    """
    found = []
    for weight in parameters:
        drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
        if weight.ndim > 1:
            filters, norms = drawn.flatten(1), weight.detach().double().flatten(1).norm(dim=1, keepdim=True)
            found.append((filters * norms / filters.norm(dim=1, keepdim=True)).flatten())
        else:
            found.append(torch.zeros_like(drawn))
    return torch.cat(found)


def loss_slice(loss: FixedLoss, at: Sequence[float], first: Tensor, second: Tensor | None = None) -> Values:
    """Return the loss at ``w + x * first + y * second``, for each y and x of ``at``; None if it isn't finite.

    Without ``second``, there is one row.
    """
    rows: Values = []
    for y in at if second is not None else (0.0,):
        aside = y * second if second is not None else torch.zeros_like(first)
        values = [loss.value_at(x * first + aside) for x in at]
        rows.append([value if math.isfinite(value) else None for value in values])
    return rows
