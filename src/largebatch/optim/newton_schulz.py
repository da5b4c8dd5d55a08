"""Newton-Schulz iteration: matrices whose singular values become about 1, all matrices of a shape in one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Muon's (https://kellerjordan.github.io/posts/muon)
_LEAST_NORM = 1e-7  # of a matrix that is scaled to norm 1
_WIDE = 2.0  # ratio of columns to rows from which products of the small side are cheaper
_RESTART = 2  # iterations before the small products start again, from a new Gram matrix


def orthogonalise(matrices: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return the matrices with singular values near 1 and the same singular vectors.

    For a matrix ``G`` of at most as many rows as columns, else for its transpose::

        X = G / ||G||_F
        5 times:  A = X X^T;  X = a X + (b A + c A^2) X          (a, b, c) = (3.4445, -4.7750, 2.0315)

    The coefficients let small singular values grow fast, and bring those above 0.01 to between 0.65 and 1.2
    (https://kellerjordan.github.io/posts/muon). Matrices of equal shape, or equal after a transposition, share each
    product.

    Args:
        matrices: tensors of two dimensions. They aren't changed.
        dtype: number format of the iteration. In fp32, wide matrices take fewer products.

    Returns:
        Matrices of the same shapes, in the format of the iteration. A zero matrix stays zero.
    """
    results: list[Tensor] = list(matrices)
    places: dict[tuple[Any, ...], list[int]] = {}
    for place, matrix in enumerate(matrices):
        places.setdefault((matrix.device, *sorted(matrix.shape)), []).append(place)
    for alike in places.values():
        tall = [matrices[i].shape[0] > matrices[i].shape[1] for i in alike]
        stacked = torch.stack([matrices[i].mT if t else matrices[i] for i, t in zip(alike, tall, strict=True)])
        stacked = stacked.to(dtype)
        stacked /= torch.linalg.matrix_norm(stacked, keepdim=True).clamp_(min=_LEAST_NORM)
        few_products = dtype == torch.float32 and stacked.shape[2] >= _WIDE * stacked.shape[1]
        for i, t, result in zip(alike, tall, (_wide if few_products else _iterated)(stacked).unbind(), strict=True):
            results[i] = result.mT if t else result
    return results


def _iterated(x: Tensor) -> Tensor:
    """Iterate matrices [k, m, n] as the formula says: ``10 n/m + 5`` products of m x m matrices."""
    a, b, c = COEFFICIENTS
    gram = x.new_empty(*x.shape[:2], x.shape[1])
    polynomial, other = torch.empty_like(gram), torch.empty_like(x)
    for _ in range(STEPS):
        torch.bmm(x, x.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        torch.baddbmm(x, polynomial, x, beta=a, out=other)
        x, other = other, x
    return x


def _wide(x: Tensor) -> Tensor:
    """Iterate matrices [k, m, n] of many columns by ``4 n/m + 14`` products of m x m matrices.

    With ``P = a I + b A + c A^2``, which commutes with ``A``, the next iteration's ``A`` is ``P A P``, and two
    iterations multiply ``X`` by ``P_2 P_1``. So only the first ``A`` and the last product have n columns. Rounding
    errors of ``A`` count more the smaller a singular value is. Therefore ``A`` is computed anew after two iterations,
    in which small singular values have grown twelvefold.
    """
    a, b, c = COEFFICIENTS
    for steps in (_RESTART, STEPS - _RESTART):
        gram = torch.bmm(x, x.mT)
        factor: Tensor | None = None
        for step in range(steps):
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            polynomial.diagonal(dim1=1, dim2=2).add_(a)
            factor = polynomial if factor is None else torch.bmm(polynomial, factor)
            if step + 1 < steps:
                gram = torch.bmm(torch.bmm(polynomial, gram), polynomial)
        assert factor is not None
        x = torch.bmm(factor, x)
    return x
