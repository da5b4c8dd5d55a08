"""Largest eigenvalue and trace of a symmetric matrix that is known only by its products with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from largebatch.machine import distributed

Product = Callable[[Tensor], Tensor]  # fp64 [n] to fp64 [n], the same in every process

TOLERANCE = 1e-3  # of the residual, relative to the eigenvalue
MOST_PRODUCTS = 200  # until an eigenvalue is found


def largest_eigenvalue(product: Product, start: Tensor) -> float | None:
    """Return the largest eigenvalue of a symmetric matrix A, by Lanczos' iteration.

    It is the largest with its sign, also if a negative eigenvalue has a larger magnitude. The iteration keeps three
    vectors and doesn't orthogonalise them again: rounding then repeats eigenvalues, but doesn't move the largest.

    Args:
        product: the product with A.
        start: a random vector, fp64 [n].

    Returns:
        A value x with ``|A v - x v| <= 0.001 |x|`` for a unit vector v. None if 200 products don't suffice.
    """
    vector, before, length = start / start.norm(), torch.zeros_like(start), 0.0
    matrix = torch.zeros(MOST_PRODUCTS, MOST_PRODUCTS, dtype=torch.float64)  # A in the basis of the vectors
    for place in range(MOST_PRODUCTS):
        image = product(vector)
        along = (vector @ image).item()
        image = image - along * vector - length * before
        length = image.norm().item()
        matrix[place, place] = along
        largest, residual = _largest(matrix[: place + 1, : place + 1], length)
        # Rank 0 decides, because machines may round differently, and all processes must stop together.
        largest, residual = distributed.from_rank_0((largest, residual))
        if math.isnan(largest):
            return None
        if residual <= TOLERANCE * abs(largest):
            return largest
        if place + 1 < MOST_PRODUCTS:
            matrix[place, place + 1] = matrix[place + 1, place] = length
        before, vector = vector, image / length
    return None


def _largest(matrix: Tensor, length: float) -> tuple[float, float]:
    """Return the largest eigenvalue in the basis, and the length of its residual. NaN for numbers that aren't finite.

    Args:
        matrix: A in the basis of the iteration's vectors, [k, k].
        length: distance of the last image to their span.
    """
    if not (matrix.isfinite().all() and math.isfinite(length)):
        return math.nan, math.nan
    values, vectors = torch.linalg.eigh(matrix)
    return values[-1].item(), length * abs(vectors[-1, -1].item())


def trace(
    product: Product, length: int, probes: int, generator: torch.Generator, device: torch.device
) -> tuple[float, float]:
    """Return Hutchinson's estimate of the trace of a symmetric matrix, and its standard error.

    The estimate is the mean of ``z A z`` over random vectors z of signs (Rademacher's distribution).

    Args:
        product: the product with the matrix.
        length: number of rows.
        probes: number of vectors, at least 2.
        generator: of the signs, on the CPU.
        device: device of the products.
    """
    found = []
    for _ in range(probes):
        signs = (2 * torch.randint(0, 2, (length,), generator=generator) - 1).to(device, torch.float64)
        found.append(signs @ product(signs))
    values = torch.stack(found)
    return values.mean().item(), values.std().item() / math.sqrt(probes)
