"""The update equations in torch's operations over lists of tensors; no value is read back from the device.

The equations stand in three places, which must agree: here, in ``fused_cpu.cpp`` and in ``fused_cuda_kernels.py``.
MERIT's equation stands only here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from largebatch.optim.param_groups import HALF, LambNumbers, LarsNumbers, Part, only


def lars(part: Part, numbers: LarsNumbers) -> Tensor:
    """Update a part in place by the equation of ``LARS``. ``part.state`` is the momentum buffers, or an empty list.

    Returns:
        fp32 of shape [3, adapted parameters] on their device: weight norm, gradient norm, trust ratio.
    """
    weights, gradients = _at_least_float32(part.weights), _at_least_float32(part.gradients)
    if numbers.maximize:
        gradients = list(torch._foreach_neg(gradients))
    directions = gradients  # g' = g + weight_decay * w
    if any(part.decayed):
        sums = torch._foreach_add(
            only(gradients, part.decayed), only(weights, part.decayed), alpha=numbers.weight_decay
        )
        directions = _replaced(gradients, part.decayed, sums)
    measured = torch.empty(3, 0, device=weights[0].device)
    if any(part.adapted):  # g' *= q
        layers = only(directions, part.adapted)
        measured = _lars_ratios(only(weights, part.adapted), only(gradients, part.adapted), layers, part, numbers)
        if numbers.maximize or all(only(part.decayed, part.adapted)):  # new tensors, not p.grad
            torch._foreach_mul_(layers, measured[2].unbind())
        else:
            directions = _replaced(directions, part.adapted, torch._foreach_mul(layers, measured[2].unbind()))
    if numbers.lr_in_momentum:
        directions = list(torch._foreach_mul(directions, numbers.lr))
    (buffers,) = part.state
    if buffers:  # v = momentum * v + q * g'
        torch._foreach_mul_(buffers, numbers.momentum)
        torch._foreach_add_(buffers, directions)
        if numbers.nesterov:
            directions = list(torch._foreach_add(directions, buffers, alpha=numbers.momentum))
        else:
            directions = buffers
    _subtract_(part.weights, directions, 1.0 if numbers.lr_in_momentum else numbers.lr)
    return measured.float()


def _lars_ratios(
    weights: list[Tensor], gradients: list[Tensor], directions: list[Tensor], part: Part, numbers: LarsNumbers
) -> Tensor:
    """Return [3, layers]: ``||w||``, ``||g||`` and ``q = coefficient * ||w|| / (denominator + eps)``, limited."""
    weight_norm, gradient_norm, direction_norm = _norms([weights, gradients, directions], part.shards)
    denominator = direction_norm if part.given_norms is None else part.given_norms.to(weight_norm)
    if numbers.sum_of_norms:
        decays = [numbers.weight_decay * decayed for decayed in only(part.decayed, part.adapted)]
        penalty = torch.stack(torch._foreach_mul(weight_norm.unbind(), decays))  # a tensor of them can't be captured
        denominator = (gradient_norm if part.given_norms is None else denominator) + penalty
    numerator, limited = _clipped(weight_norm, numbers.norm_clip), _clipped(denominator, numbers.norm_clip)
    ratio = _one_where_zero(numbers.coefficient * numerator / (limited + numbers.eps), weight_norm, denominator)
    if numbers.larc:
        ratio = ratio / numbers.lr
    return torch.stack([weight_norm, gradient_norm, _clipped(ratio, numbers.max_ratio)])


def lamb(part: Part, numbers: LambNumbers) -> Tensor:
    """Update a part in place by the equation of ``LAMB``; the result is as in ``lars``.

    ``part.state`` is both moments, and the step counts where these are tensors, else an empty list.
    """
    weights, gradients, directions = _adam_directions(part, numbers)
    measured = torch.empty(3, 0, device=weights[0].device)
    if any(part.adapted):  # u *= min(z(||w||) / ||u||, max_ratio)
        layers = only(directions, part.adapted)
        lists = [only(weights, part.adapted), only(gradients, part.adapted), layers]
        weight_norm, gradient_norm, direction_norm = _norms(lists, part.shards)
        ratio = _clipped(weight_norm, numbers.norm_clip) / direction_norm
        ratio = _clipped(_one_where_zero(ratio, weight_norm, direction_norm), numbers.max_ratio)
        measured = torch.stack([weight_norm, gradient_norm, ratio])
        torch._foreach_mul_(layers, ratio.unbind())
    _subtract_(part.weights, directions, numbers.lr)
    return measured.float()


def merit(part: Part, numbers: LambNumbers) -> Tensor:
    """Update a part in place by the equation of ``MERIT``; the state is as in ``lamb``, the result as in ``lars``.

    The trust ratio of a layer is the ratio of the norms of its direction with and without the element-wise factors.
    """
    weights, gradients, directions = _adam_directions(part, numbers)
    measured = torch.empty(3, 0, device=weights[0].device)
    if any(part.adapted):  # u = clip(s * u, update_clip)
        layers, own = only(directions, part.adapted), only(weights, part.adapted)
        scaled = [
            torch.mul(layer, _element_ratios(weight, layer, numbers)).clamp_(-part.update_clip, part.update_clip)
            for weight, layer in zip(own, layers, strict=True)
        ]
        lists = [own, only(gradients, part.adapted), layers, scaled]
        weight_norm, gradient_norm, direction_norm, scaled_norm = _norms(lists, ())
        ratio = torch.where(direction_norm == 0, 1.0, scaled_norm / direction_norm)
        measured = torch.stack([weight_norm, gradient_norm, ratio])
        directions = _replaced(directions, part.adapted, scaled)
    _subtract_(part.weights, directions, numbers.lr)
    return measured.float()


def _element_ratios(weight: Tensor, direction: Tensor, numbers: LambNumbers) -> Tensor:
    """Return ``s`` of ``MERIT``, which broadcasts to the layer's shape."""
    norms = [*zip(_line_norms(weight), _line_norms(direction), strict=True)]
    norms.append((norms[0][0].max(), norms[0][1].max()))
    # Operations on rows and columns alone are cheap: each operation on the whole layer costs memory traffic.
    rows, columns, layer = (
        _clipped(_clipped(own, numbers.norm_clip) / other, numbers.max_ratio) for own, other in norms
    )
    zero_rows, zero_columns, _ = ((own == 0) | (other == 0) for own, other in norms)
    ratio = torch.maximum(torch.maximum(rows, layer), columns)
    return ratio.masked_fill_(zero_rows | zero_columns, min(1.0, numbers.max_ratio))


def _line_norms(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the max-norms of rows and of columns, with the tensor's dimensions. Those of a vector are its own."""
    lengths = tensor.abs()
    if tensor.ndim <= 1:
        return lengths.max(), lengths.max()
    # On CPU, a maximum over the first dimension of contiguous memory is ten times faster than over another.
    rows, columns = (lengths.transpose(0, dim).contiguous().amax(0).unsqueeze(dim) for dim in (1, 0))
    return rows, columns


def _adam_directions(part: Part, numbers: LambNumbers) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Update the moments in place. Return weights and gradients of at least fp32, and the directions ``u``."""
    weights, gradients = _at_least_float32(part.weights), _at_least_float32(part.gradients)
    if numbers.maximize:
        gradients = list(torch._foreach_neg(gradients))
    exp_avgs, exp_avg_sqs, steps = part.state
    torch._foreach_lerp_(exp_avgs, gradients, 1 - numbers.beta1)  # m = beta1 * m + (1 - beta1) * g
    torch._foreach_mul_(exp_avg_sqs, numbers.beta2)  # v = beta2 * v + (1 - beta2) * g^2
    torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, 1 - numbers.beta2)
    correction1: Any = numbers.correction1
    correction2: Any = numbers.correction2
    if steps:
        taken = torch.stack(steps)
        correction1, correction2 = (_correction(beta, taken).unbind() for beta in (numbers.beta1, numbers.beta2))
    denominators = list(torch._foreach_div(exp_avg_sqs, correction2))  # u = m_hat / (sqrt(v_hat) + eps)
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, numbers.eps)
    directions = list(torch._foreach_div(exp_avgs, correction1))
    torch._foreach_div_(directions, denominators)
    if any(part.decayed):  # u += weight_decay * w
        decayed = only(directions, part.decayed)
        torch._foreach_add_(decayed, only(weights, part.decayed), alpha=numbers.weight_decay)
    return weights, gradients, directions


def _correction(beta: float, steps: Tensor) -> Tensor:
    """Return ``1 - beta^t`` without the cancellation that fp32 has where ``beta^t`` is near 1."""
    return -torch.expm1(steps * (math.log(beta) if beta else -math.inf))


# -- lists of tensors


def _at_least_float32(tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors, in fp32 if they are fp16 or bf16."""
    return [tensor.float() for tensor in tensors] if tensors[0].dtype in HALF else tensors


def _replaced(tensors: list[Tensor], wanted: Sequence[bool], others: Sequence[Tensor]) -> list[Tensor]:
    """Return ``tensors`` with the wanted ones replaced by ``others``, in order."""
    following = iter(others)
    return [next(following) if yes else tensor for tensor, yes in zip(tensors, wanted, strict=True)]


def _subtract_(weights: list[Tensor], moves: list[Tensor], lr: Any) -> None:
    """Compute ``weight -= lr * move``; ``lr`` is a number or a 0-dimensional tensor."""
    if isinstance(lr, Tensor):
        torch._foreach_sub_(weights, torch._foreach_mul(moves, lr))
    else:
        torch._foreach_add_(weights, moves, alpha=-lr)


def _norms(lists: Sequence[list[Tensor]], shards: tuple[Any, ...]) -> Tensor:
    """Return the L2 norms of whole layers, of shape [lists, layers]; each list has one tensor per layer."""
    tensors = list(chain.from_iterable(lists))
    if tensors[0].device.type == "cpu" and not torch.compiler.is_compiling():
        values = _norms_by_pieces(tensors)
    else:
        values = torch.stack(torch._foreach_norm(tensors))
    if shards:
        squares = values.double().square()
        for process_group in shards:
            dist.all_reduce(squares, group=process_group)
        values = squares.sqrt()
    return values.view(len(lists), -1)


def _norms_by_pieces(tensors: list[Tensor]) -> Tensor:
    """Sum pieces in fp64: the error of torch's norm on CPU grows with the elements, 8e-7 at 2^17, 8e-5 at 2^22."""
    pieces = [torch.split(tensor.flatten(), 1 << 17) if tensor.numel() > 1 << 17 else (tensor,) for tensor in tensors]
    values = torch.stack(torch._foreach_norm(list(chain.from_iterable(pieces))))
    if len(values) == len(tensors):
        return values
    lengths = torch.tensor([len(own) for own in pieces])
    return torch.segment_reduce(values.double().square(), "sum", lengths=lengths).sqrt()


def _clipped(values: Tensor, limit: float) -> Tensor:
    """Return ``min(value, limit)``; NaN stays NaN. Infinity is no limit."""
    return values if limit == math.inf else values.clamp(max=limit)


def _one_where_zero(ratio: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the trust ratio, 1 where either norm is 0."""
    return torch.where((numerator == 0) | (denominator == 0), 1.0, ratio)
