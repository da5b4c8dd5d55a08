"""Sharpness of the loss over a fixed batch: eigenvalues and trace of its Hessian, and its rise nearby."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from largebatch.instruments.curvature import largest_eigenvalue, trace
from largebatch.instruments.fixed_loss import FixedLoss
from largebatch.machine import distributed
from largebatch.runs.metrics import Row

PROBES = 8  # random vectors of the trace
SAM_RADIUS = 0.05  # the default of SAM (arXiv 2010.01412)
ASAM_RADIUS = 0.5  # ASAM's on CIFAR-10 (arXiv 2102.11600)


def sharpness(loss: FixedLoss, inverse: Tensor | None, seed: int) -> Row:
    """Return the sharpness at the present parameters of ``loss`` as metrics, the same in every process.

    - ``sharpness/eigenvalue``: the largest eigenvalue of the Hessian H
    - ``sharpness/preconditioned``: the largest eigenvalue of ``D^-1/2 H D^-1/2``
    - ``sharpness/trace``, ``sharpness/trace_se``: an estimate of the trace of H, and its standard error
    - ``sharpness/sam``: ``L(w + r g / |g|) - L(w)`` with the gradient g and r = 0.05
    - ``sharpness/asam``: ``L(w + r w^2 g / |w g|) - L(w)``, all elementwise, with r = 0.5

    The last two are the rise after one step of ascent, so lower bounds of the largest rise within the radius. A number
    that isn't known or isn't finite is left out.

    Args:
        loss: the loss over a fixed batch.
        inverse: the diagonal of ``D^-1``, fp64 [n]. None: unknown.
        seed: of the random vectors. The same seed makes the numbers of two measurements comparable.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(loss.length, generator=generator, dtype=torch.float64).to(loss.device)
    found: dict[str, float | None] = {"eigenvalue": largest_eigenvalue(loss.product, start)}
    if inverse is not None and bool((inverse == 1).all()):
        found["preconditioned"] = found["eigenvalue"]
    elif inverse is not None:
        root = inverse.sqrt()
        found["preconditioned"] = largest_eigenvalue(lambda vector: root * loss.product(root * vector), start)
    found["trace"], found["trace_se"] = trace(loss.product, loss.length, PROBES, generator, loss.device)
    value, gradient, weights = loss.value(), loss.gradient(), loss.parameters()
    found["sam"] = loss.value_at(_scaled(gradient, gradient, SAM_RADIUS)) - value
    found["asam"] = loss.value_at(_scaled(weights.square() * gradient, weights * gradient, ASAM_RADIUS)) - value
    numbers = distributed.from_rank_0(found)
    return {f"sharpness/{name}": x for name, x in numbers.items() if x is not None and math.isfinite(x)}


def _scaled(step: Tensor, norm_of: Tensor, radius: float) -> Tensor:
    """Return ``step * radius / |norm_of|``; zeros without a gradient."""
    norm = norm_of.norm()
    return torch.where(norm > 0, radius * step / norm, torch.zeros_like(step))
