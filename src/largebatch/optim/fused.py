"""The choice of the fused step: the tensors that can take it, and the module that has it."""

from __future__ import annotations

from itertools import chain
from types import ModuleType

import torch
from torch import Tensor

from largebatch.optim.param_groups import Group, Part


def fused_kernels(equation: str, group: Group, part: Part) -> tuple[ModuleType | None, str]:
    """Return the module with the fused step of an equation for these tensors, or None and the reason.

    The module has ``why_not(weights)``, and ``lars(part, numbers)`` and ``lamb(part, numbers)`` as ``unfused`` has.
    """
    weights, device = part.weights, part.weights[0].device.type
    if device == "cpu" and (group["capturable"] or isinstance(group["lr"], Tensor)):
        return None, "the fused step on CPU requires numbers, not capturable=True or a tensor as learning rate"
    if part.shards or not {type(weight) for weight in weights} <= {Tensor, torch.nn.Parameter}:
        return None, "parameters are sharded or of a special tensor type"
    if part.gradients[0].dtype != weights[0].dtype:
        return None, "gradients and parameters have different types"
    state, steps = part.state[:2], list(chain(*part.state[2:]))  # LAMB's third list is step counts
    if {(step.device, step.dtype) for step in steps} - {(weights[0].device, torch.float32)}:
        return None, "step counts aren't fp32 tensors on the device"
    if not _same_layout(weights, part.gradients, *state):
        return None, "parameters, gradients and state have different memory layouts, or gaps in memory"
    if device == "cpu":
        from largebatch.optim import fused_cpu as kernels
    elif device == "cuda":
        from largebatch.optim import fused_cuda as kernels  # type: ignore[no-redef]
    else:
        return None, f"there is no fused step for {device}"
    if not hasattr(kernels, equation):
        return None, f"{equation} has no fused step"
    reason = kernels.why_not(weights)
    return (None, reason) if reason else (kernels, "")


def fused_tvlars_coefficient(step: Tensor, group: Group) -> Tensor | None:
    """Advance ``step`` and return TVLARS's factor for it in one launch; None if that isn't possible.

    A captured graph has few kernels, so that ten small operations would be a noticeable part of a step.
    """
    if not step.is_cuda or torch.compiler.is_compiling() or not may_be_fused(group):
        return None
    from largebatch.optim import fused_cuda

    if fused_cuda.why_not([step]):
        return None
    options = [group[name] for name in ("trust_coefficient", "lmbda", "alpha", "delay", "gamma_min")]
    return fused_cuda.tvlars_coefficient(step, *options)


def may_be_fused(group: Group) -> bool:
    """Return True if the options allow the fused step."""
    return group["fused"] or (group["fused"] is None and group["foreach"] is None)


def _same_layout(weights: list[Tensor], *others: list[Tensor]) -> bool:
    """Return True if elements that belong together have the same offset in memory, without gaps."""
    if all(map(Tensor.is_contiguous, chain(weights, *others))):
        return True
    if not all(map(torch.ops.aten.is_non_overlapping_and_dense, weights)):
        return False
    layouts = list(map(_layout, weights))
    return all(list(map(_layout, tensors)) == layouts for tensors in others if tensors)


def _layout(tensor: Tensor) -> list[tuple[int, int]]:
    """Return size and stride of each dimension of more than one element."""
    return [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]
