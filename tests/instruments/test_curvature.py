"""Eigenvalue and trace from products with vectors, against matrices of a known spectrum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from largebatch.instruments import curvature
from largebatch.instruments.curvature import largest_eigenvalue, trace

CPU = torch.device("cpu")
SPECTRA = {
    "positive": torch.linspace(0, 30, 60),
    "one outlier": torch.cat([torch.linspace(-0.1, 0.1, 59), torch.tensor([40.0])]),
    "the most negative has the largest magnitude": torch.cat([torch.linspace(-90, 0.5, 59), torch.tensor([2.0])]),
    "all negative": torch.linspace(-30, -1, 60),
    "repeated": torch.cat([torch.zeros(50), torch.full((10,), 7.0)]),
    "one element": torch.tensor([-3.0]),
    "zero": torch.zeros(20),
}


def rotated(spectrum: Tensor, seed: int) -> Tensor:
    """Return a symmetric matrix with these eigenvalues, in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64))
    return basis @ spectrum.double().diag() @ basis.mT


def random_start(length: int, seed: int) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SPECTRA)
def test_the_largest_eigenvalue_with_its_sign(name: str, seed: int) -> None:
    matrix = rotated(SPECTRA[name], seed)
    found = largest_eigenvalue(lambda vector: matrix @ vector, random_start(len(matrix), seed + 100))
    assert found == pytest.approx(SPECTRA[name].max().item(), rel=0.005, abs=1e-12)


def test_rounding_of_fp32_products_moves_no_eigenvalue() -> None:
    """Without a new orthogonalisation, vectors lose orthogonality after an eigenvalue has converged."""
    spectrum = torch.cat([torch.logspace(-6, 1, 499), torch.tensor([11.0])])
    matrix = rotated(spectrum, 0).float()
    found = largest_eigenvalue(lambda vector: (matrix @ vector.float()).double(), random_start(500, 1))
    assert found == pytest.approx(11, rel=0.005)


def test_an_eigenvalue_that_has_not_converged_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = rotated(SPECTRA["positive"], 0)
    monkeypatch.setattr(curvature, "MOST_PRODUCTS", 3)
    assert largest_eigenvalue(lambda vector: matrix @ vector, random_start(60, 0)) is None


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_products_that_are_not_finite_have_no_eigenvalue(number: float) -> None:
    assert largest_eigenvalue(lambda vector: vector * number, random_start(5, 0)) is None


def test_the_trace_of_a_diagonal_matrix_is_exact() -> None:
    diagonal = torch.linspace(-3, 8, 50, dtype=torch.float64)
    found = trace(lambda vector: diagonal * vector, 50, 3, torch.Generator().manual_seed(0), CPU)
    assert found == (pytest.approx(125), pytest.approx(0, abs=1e-12))


def test_the_standard_error_of_the_trace_is_its_scatter() -> None:
    """Over many seeds, errors over standard errors have the spread of Student's t."""
    matrix = rotated(SPECTRA["positive"], 0)
    generator = torch.Generator().manual_seed(0)
    pairs = [trace(lambda vector: matrix @ vector, 60, 8, generator, CPU) for _ in range(400)]
    errors = torch.tensor([(estimate - 900) / error for estimate, error in pairs])
    assert abs(errors.mean()) < 0.15
    assert (errors.abs() < 2.365).double().mean() == pytest.approx(0.95, abs=0.025)  # t with 7 degrees of freedom
