"""Norms and squares of the contributions of groups of samples to a layer's weight gradient.

A group is ``sample_size`` consecutive samples; a *row* is one sample at one position (of a sequence, an image, ...).
With the rows' inputs X [R, K] and output gradients G [R, O], the group adds ``G^T X`` to the gradient of a linear
layer's weight; a convolution is a linear layer on patches. Its norm can be computed in two ways:

- direct: write ``G^T X`` out, K*O numbers, in about R*K*O multiplications;
- Gram: ``||G^T X||^2 = sum((G G^T) * (X X^T))``, R*R numbers, in about R*R*(K + O) multiplications.

The code takes the way with fewer multiplications; in measurements on CPUs it was the faster, except for ties. The sum
of the squares, element by element, needs the direct way, except for a group of one row: the square of an outer product
is the outer product of the squares, so that one product ``(G^2)^T X^2`` sums them over all groups. All
functions take as many groups at a time as fit a slice of fixed size, and sum in fp32 (fp64 for fp64).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d

_CPU_SLICE = 8 * 2**20  # bytes: fits a core's share of the cache
_DEVICE_SLICE = 256 * 2**20  # bytes: enough work for a launch


def linear_group_norms(inputs: Tensor, gradients: Tensor, sample_size: int) -> Tensor:
    """Compute the norms of the groups' contributions to the weight gradient of ``nn.Linear``.

    Args:
        inputs: [N, ..., K], the layer's input; dimensions between the first and the last are positions.
        gradients: [N, ..., O], the gradient with respect to its output.
        sample_size: samples a group, a divisor of N.

    Returns:
        [J], with J = N / sample_size groups.
    """
    groups = len(inputs) // sample_size
    x = inputs.reshape(groups, -1, inputs.shape[-1])
    g = gradients.reshape(groups, -1, gradients.shape[-1])
    rows, k, o = x.shape[1], x.shape[2], g.shape[2]
    if rows == 1:  # an outer product
        return norms(x) * norms(g)
    gram = _gram_is_cheaper(rows, k, o)
    numbers = rows * (k + o) + (2 * rows * rows if gram else k * o)
    at_once = _groups_at_once(numbers, inputs)
    found = []
    for part in zip(torch.split(x, at_once), torch.split(g, at_once), strict=True):
        x_part, g_part = map(_at_least_float32, part)
        found.append(_gram_norms(x_part, g_part) if gram else norms(g_part.mT @ x_part))
    return torch.cat(found)


def conv_group_norms(inputs: Tensor, gradients: Tensor, sample_size: int, conv: Conv) -> Tensor:
    """Compute the norms of the groups' contributions to the weight gradient of a convolution.

    Args:
        inputs: [N, C, *space], the layer's input, before its padding.
        gradients: [N, O, *space of the output], the gradient with respect to its output.
        sample_size: samples a group, a divisor of N.
        conv: the layer, for its stride, padding, dilation, groups and padding mode.

    Returns:
        [J], with J = N / sample_size groups.
    """
    rows = sample_size * math.prod(gradients.shape[2:])
    k, o = math.prod(conv.weight.shape[1:]), conv.out_channels // conv.groups  # within one of the layer's own groups
    gram = _gram_is_cheaper(rows, k, o)
    patches = rows * (k + o) * conv.groups + 2 * rows * rows * conv.groups
    written = sample_size * (inputs[0].numel() + gradients[0].numel()) + conv.weight.numel()
    samples = sample_size * _groups_at_once(patches if gram else written, inputs)
    found = []
    for part in zip(torch.split(inputs, samples), torch.split(gradients, samples), strict=True):
        x, g = map(_at_least_float32, part)
        if gram:
            found.append(_conv_gram_norms(x, g, sample_size, conv))
        else:
            found.append(norms(_conv_weight_gradients(x, g, sample_size, conv)))
    return torch.cat(found)


def bias_group_norms(gradients: Tensor, sample_size: int, channels: int) -> Tensor:
    """Compute the norms of the groups' contributions to a bias's gradient.

    Args:
        gradients: [N, ...], the gradient with respect to the layer's output.
        sample_size: samples a group, a divisor of N.
        channels: the dimension of ``gradients`` along which the bias varies.

    Returns:
        [J], with J = N / sample_size groups.
    """
    g = _at_least_float32(gradients.movedim(channels, -1))
    return norms(g.reshape(len(g) // sample_size, -1, g.shape[-1]).sum(1))


# -- sums of squares


def linear_group_squares(inputs: Tensor, gradients: Tensor, sample_size: int) -> Tensor:
    """Sum, over groups, the squares of the elements of a group's contribution; arguments as in ``linear_group_norms``.

    Returns:
        [O, K], as the weight.
    """
    groups = len(inputs) // sample_size
    x = _at_least_float32(inputs.reshape(groups, -1, inputs.shape[-1]))
    g = _at_least_float32(gradients.reshape(groups, -1, gradients.shape[-1]))
    if x.shape[1] == 1:
        return g[:, 0].square().mT @ x[:, 0].square()
    at_once = _groups_at_once(x[0].numel() + g[0].numel() + x.shape[2] * g.shape[2], inputs)
    parts = zip(torch.split(x, at_once), torch.split(g, at_once), strict=True)
    return _sum(squares_sum(g_part.mT @ x_part) for x_part, g_part in parts)


def conv_group_squares(inputs: Tensor, gradients: Tensor, sample_size: int, conv: Conv) -> Tensor:
    """Sum, over groups, the squares of the elements of a group's contribution; arguments as in ``conv_group_norms``.

    Returns:
        The weight's shape.
    """
    written = sample_size * (inputs[0].numel() + gradients[0].numel()) + conv.weight.numel()
    samples = sample_size * _groups_at_once(written, inputs)
    parts = zip(torch.split(inputs, samples), torch.split(gradients, samples), strict=True)
    return _sum(
        squares_sum(_conv_weight_gradients(_at_least_float32(x), _at_least_float32(g), sample_size, conv))
        for x, g in parts
    )


def bias_group_squares(gradients: Tensor, sample_size: int, channels: int) -> Tensor:
    """Sum, over groups, the squares of the elements of a group's contribution; arguments as in ``bias_group_norms``.

    Returns:
        The bias's shape.
    """
    g = _at_least_float32(gradients.movedim(channels, -1))
    return squares_sum(g.reshape(len(g) // sample_size, -1, g.shape[-1]).sum(1))


def squares_sum(contributions: Tensor) -> Tensor:
    """Return the sum over groups of the squares of contributions [J, ...]."""
    return _at_least_float32(contributions).square().sum(0)


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return reduce(Tensor.add_, parts)


# -- the two ways


def _gram_is_cheaper(rows: int, k: int, o: int) -> bool:
    return rows * (k + o) < k * o


def _gram_norms(x: Tensor, g: Tensor) -> Tensor:
    """Return ``||g^T x||`` of x [J, ..., R, K] and g [J, ..., R, O], over all but the first dimension."""
    squares = (g @ g.mT) * (x @ x.mT)
    return squares.flatten(1).sum(1).clamp_(min=0).sqrt_()  # rounding can make a sum of 0 negative


def _conv_gram_norms(inputs: Tensor, gradients: Tensor, sample_size: int, conv: Conv) -> Tensor:
    x = _patches(inputs, conv)  # [N, conv.groups, positions, K]
    g = gradients.reshape(len(x), conv.groups, -1, x.shape[2]).mT  # [N, conv.groups, positions, O]
    x, g = (
        rows.reshape(-1, sample_size, *rows.shape[1:]).transpose(1, 2).flatten(2, 3)  # [J, conv.groups, R, K or O]
        for rows in (x, g)
    )
    return _gram_norms(x, g)


def _conv_weight_gradients(inputs: Tensor, gradients: Tensor, sample_size: int, conv: Conv) -> Tensor:
    """Return [J, *the weight's shape] by one call in which each group of samples is a group of channels."""
    padding: Any = conv.padding
    if conv.padding_mode != "zeros" or isinstance(padding, str):
        inputs = _pad(inputs, conv)
        padding = [0] * len(conv.kernel_size)
    groups = len(inputs) // sample_size
    x, g = (  # [sample_size, J * channels, *space]
        rows.reshape(groups, sample_size, *rows.shape[1:]).transpose(0, 1).flatten(1, 2) for rows in (inputs, gradients)
    )
    weight = inputs.new_empty(1).expand(groups * conv.out_channels, *conv.weight.shape[1:])  # for its shape only
    gradient: Tensor = torch.ops.aten.convolution_backward(
        g, x, weight, None, conv.stride, padding, conv.dilation,
        False, conv.output_padding, groups * conv.groups, (False, True, False),
    )[1]  # fmt: skip
    return gradient.reshape(groups, *conv.weight.shape)


# -- patches and padding of a convolution


def _patches(inputs: Tensor, conv: Conv) -> Tensor:
    """Return the kernel's input at each position, [N, conv.groups, positions, kernel elements * channels a group]."""
    x = _pad(inputs, conv).movedim(1, -1).contiguous()  # channels last: the copy below moves whole pixels
    for dim, (k, s, d) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), start=1):
        x = x.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
    space = inputs.ndim - 2
    x = torch.unflatten(x, space + 1, (conv.groups, -1))  # [N, *positions, conv.groups, channels, *kernel]
    x = x.movedim(space + 1, 1).movedim(space + 2, -1)
    return x.flatten(2, space + 1).flatten(3)


def _pad(inputs: Tensor, conv: Conv) -> Tensor:
    if isinstance(conv.padding, str):  # "valid" or "same"
        sides = conv._reversed_padding_repeated_twice
    else:
        sides = [side for side in reversed(conv.padding) for _ in range(2)]
    if not any(sides):
        return inputs
    return F.pad(inputs, sides, "constant" if conv.padding_mode == "zeros" else conv.padding_mode)


def _groups_at_once(numbers: int, like: Tensor) -> int:
    """Return the number of groups in a slice, if a group needs ``numbers`` numbers."""
    limit = _CPU_SLICE if like.device.type == "cpu" else _DEVICE_SLICE
    return max(1, limit // (4 * numbers))


def norms(x: Tensor) -> Tensor:
    """Return the norms [J] of x [J, ...], over all dimensions but the first."""
    x = _at_least_float32(x)
    if x.ndim > 2:  # in two levels: over millions of elements at once, torch's CPU kernel is inexact
        x = torch.linalg.vector_norm(x.flatten(2), dim=2)
    found: Tensor = torch.linalg.vector_norm(x, dim=1)
    return found


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
