"""Barlow Twins loss of a global batch, and its gradient, computed in parts.

Mean, variance and cross-correlation are sums over samples. Everything after the projector's first layer, including
batch norm, is therefore computed a few rows at a time: sums over rows, then over processes. Only the output of each
layer is kept. The gradient goes back the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from largebatch.machine import distributed
from largebatch.modes.bt import EPSILON, Projector, Stage, barlow_loss


@dataclass(frozen=True)
class Statistics:
    """Mean and biased variance of one view's values over the global batch of ``count`` images, in fp32 [width]."""

    mean: Tensor
    variance: Tensor
    count: int

    @property
    def reciprocal_deviation(self) -> Tensor:
        return torch.rsqrt(self.variance + EPSILON)

    def standardise(self, values: Tensor) -> Tensor:
        return (values.float() - self.mean) * self.reciprocal_deviation


class GlobalLoss(NamedTuple):
    parts: tuple[Tensor, Tensor, Tensor]  # the unscaled loss, its on-diagonal and its off-diagonal part
    gradient: Tensor  # with respect to ``first``: [2, n, W]


Graph = tuple[Tensor, Tensor]  # input and output of a pass whose autograd graph is kept


@torch.no_grad()
def global_loss(
    projector: Projector,
    first: Tensor,
    rows: int,
    autocast: torch.autocast,
    *,
    images: int,
    lmbda: float,
    scale: float,
) -> GlobalLoss:
    """Return the loss over the global batch, and its gradient with respect to this process's ``first``.

    The gradients of the projector's parameters, except of its first layer, are added to their ``.grad``. All gradients
    are multiplied by the number of processes, so that their mean over processes is the gradient. The projector's
    running statistics are updated.

    Memory, in addition to ``first``: the outputs of the projector's later layers, and once more the widest of them.

    Args:
        first: [2, n, W], both views of this process's n images after the projector's first layer; n may be 0.
        rows: number of images at once. n or more keep the graph of the forward pass; fewer repeat each part of the
            forward pass in the backward pass.
        autocast: precision of the linear layers; everything else is computed in fp32.
        images: number of images of all processes.
        scale: factor of the loss in the gradient.
    """
    inputs: list[Tensor] = []
    statistics: list[list[Statistics]] = []
    graphs: list[list[Graph | None]] = []
    values = first
    for stage in projector.stages:
        assert isinstance(stage, Stage)
        inputs.append(values)
        statistics.append([global_statistics(view, rows, images) for view in values])
        _track(stage.norm, statistics[-1])
        passed = [_forward(stage, *view, rows, autocast) for view in zip(values, statistics[-1], strict=True)]
        values = torch.stack([output for output, _ in passed])
        graphs.append([graph for _, graph in passed])
    if not inputs:
        values = values.clone()  # _correlation_gradient_ works in place
    parts = _correlation_gradient_(values, rows, images, lmbda, scale)
    for stage in reversed(projector.stages):
        assert isinstance(stage, Stage)
        before = inputs.pop(), statistics.pop(), graphs.pop()
        values = torch.stack([_backward(stage, *view, rows, autocast) for view in zip(*before, values, strict=True)])
    return GlobalLoss(parts, values)


def global_statistics(values: Tensor, rows: int, images: int) -> Statistics:
    """Return the statistics of one view's ``values`` [n, width] over all processes, which have ``images`` rows.

    Rounding doesn't grow with the number of parts.
    """
    parts = [values[part].float() for part in _parts(values, rows)]
    means = [part.mean(0).double() for part in parts]
    mean, variance = torch.zeros(2, values.shape[1], dtype=torch.float64, device=values.device)
    for part, its_mean in zip(parts, means, strict=True):
        mean.add_(its_mean, alpha=len(part) / images)
    distributed.sum_over_processes(mean)
    for part, its_mean in zip(parts, means, strict=True):
        spread = part.var(0, correction=0).double() + (its_mean - mean).square()
        variance.add_(spread, alpha=len(part) / images)
    distributed.sum_over_processes(variance)
    return Statistics(mean.float(), variance.float(), images)


def _track(norm: nn.BatchNorm1d, statistics: Sequence[Statistics]) -> None:
    """Update the running statistics like ``nn.BatchNorm1d`` for one view after the other."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    for view in statistics:
        norm.running_mean.lerp_(view.mean, norm.momentum)
        norm.running_var.lerp_(view.variance * view.count / (view.count - 1), norm.momentum)
        norm.num_batches_tracked += 1


def _forward(
    stage: Stage, values: Tensor, statistics: Statistics, rows: int, autocast: torch.autocast
) -> tuple[Tensor, Graph | None]:
    """Pass one view through a stage; return its output, and its graph if ``rows`` is the whole view."""
    if rows >= len(values):
        graph = _pass(stage, statistics.standardise(values), autocast)
        return graph[1].detach(), graph
    outputs = None
    for part in _parts(values, rows):
        with autocast:
            output = stage.from_standardised(statistics.standardise(values[part]))
        if outputs is None:
            outputs = output.new_empty(len(values), *output.shape[1:])
        outputs[part] = output
    assert outputs is not None
    return outputs, None


def _pass(stage: Stage, standardised: Tensor, autocast: torch.autocast) -> Graph:
    with torch.enable_grad(), autocast:
        return standardised.requires_grad_(), stage.from_standardised(standardised)


def _backward(
    stage: Stage,
    values: Tensor,
    statistics: Statistics,
    graph: Graph | None,
    gradient: Tensor,
    rows: int,
    autocast: torch.autocast,
) -> Tensor:
    """Turn the gradient with respect to a stage's output into the gradient with respect to its input ``values``.

    Through batch norm it is ``(g - mean(g) - x * mean(g * x)) / deviation``. x is the standardised input, g the
    gradient with respect to x, and the means are over the global batch.
    """
    result = torch.empty_like(values)
    sums = torch.zeros(2, values.shape[1], device=values.device)
    for part in _parts(values, rows):
        inputs, outputs = graph or _pass(stage, statistics.standardise(values[part]), autocast)
        torch.autograd.backward(outputs, gradient[part].to(outputs.dtype))
        assert inputs.grad is not None
        result[part] = inputs.grad
        sums += torch.stack([inputs.grad.sum(0), (inputs.grad * inputs.detach()).sum(0)])
    mean, mean_product = distributed.sum_over_processes(sums) / statistics.count
    for part in _parts(values, rows):
        inputs = statistics.standardise(values[part])
        result[part] = (result[part] - mean - inputs * mean_product) * statistics.reciprocal_deviation
    return result


def _parts(values: Tensor, rows: int) -> Iterator[slice]:
    return (slice(row, row + rows) for row in range(0, len(values), rows))


def _correlation_gradient_(
    values: Tensor, rows: int, images: int, lmbda: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace the embeddings ``values`` [2, n, D] by their gradient; return the loss and its parts."""
    statistics = [global_statistics(view, rows, images) for view in values]
    width, count = values.shape[2], images
    correlation = torch.zeros(width, width, device=values.device)
    for part in _parts(values[0], rows):
        one, two = (of.standardise(view[part]) for of, view in zip(statistics, values, strict=True))
        correlation.addmm_(one.mT, two)
    correlation = distributed.sum_over_processes(correlation) / count

    slope = lmbda * correlation
    slope.diagonal().copy_(correlation.diagonal() - 1)
    slope *= 2 * scale * distributed.processes() / count  # the gradient with respect to the sum of products

    # Standardised values have mean 0, and so has their gradient. Its mean product with them is C times the slope.
    product = slope * correlation
    products = product.sum(1), product.sum(0)
    for part in _parts(values[0], rows):
        one, two = (of.standardise(view[part]) for of, view in zip(statistics, values, strict=True))
        gradients = two @ slope.mT - one * products[0], one @ slope - two * products[1]
        for view, gradient, of in zip(values, gradients, statistics, strict=True):
            view[part] = gradient * of.reciprocal_deviation
    return barlow_loss(correlation, lmbda)
