"""Weighted nearest-neighbour vote, compared with one query at a time in NumPy and with scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from largebatch.modes.features import knn_predictions

CLASSES = 4


def some_features(n: int, width: int = 5, seed: int = 0) -> Tensor:
    """Return features near their classes' directions (see ``labels_of``), with lengths from 0.1 to 10."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(9))
    features = centres[labels_of(n)] + torch.randn(n, width, generator=generator)
    return features * torch.logspace(-1, 1, n)[torch.randperm(n, generator=generator), None]


def labels_of(n: int) -> Tensor:
    return torch.arange(n) % CLASSES


def one_by_one(queries: Tensor, bank: Tensor, labels: Tensor, neighbours: int, temperature: float) -> list[int]:
    """Return each query's prediction, computed in float64."""

    def direction(vector: Tensor) -> NDArray[np.float64]:
        values = vector.double().numpy()
        found: NDArray[np.float64] = values / np.sqrt((values**2).sum())
        return found

    predictions = []
    for query in queries:
        similarities = [float(direction(query) @ direction(row)) for row in bank]
        nearest = sorted(range(len(bank)), key=lambda row: -similarities[row])[:neighbours]
        votes = [0.0] * CLASSES
        for row in nearest:
            votes[int(labels[row])] += np.exp(similarities[row] / temperature)
        predictions.append(int(np.argmax(votes)))
    return predictions


def predicted(queries: Tensor, bank: Tensor, neighbours: int, temperature: float = 0.07) -> Tensor:
    return knn_predictions(queries, bank, labels_of(len(bank)), CLASSES, neighbours=neighbours, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.07, 0.5, 10.0])
@pytest.mark.parametrize("neighbours", [1, 2, 7, 20, 60])
def test_predictions_equal_those_computed_one_query_at_a_time(neighbours: int, temperature: float) -> None:
    queries, bank = some_features(40), some_features(60, seed=1)
    got = predicted(queries, bank, neighbours, temperature)
    assert got.dtype == torch.int64
    assert got.tolist() == one_by_one(queries, bank, labels_of(60), neighbours, temperature)
    assert 0.3 < (got == labels_of(40)).float().mean() < 1  # neither chance nor perfect


def test_one_neighbour_agrees_with_scikit_learn_on_features_of_length_1() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    queries, bank = (torch.nn.functional.normalize(some_features(n, 16, seed=n)) for n in (200, 500))
    theirs = KNeighborsClassifier(n_neighbors=1).fit(bank.numpy(), labels_of(500).numpy())
    for features in (queries, 3 * queries):  # lengths don't matter
        assert predicted(features, bank, neighbours=1).tolist() == theirs.predict(queries.numpy()).tolist()


def test_more_neighbours_than_rows_in_the_bank_are_all_rows() -> None:
    queries, bank = some_features(30), some_features(9, seed=1)
    assert torch.equal(predicted(queries, bank, neighbours=1000), predicted(queries, bank, neighbours=9))


def test_extreme_temperatures_neither_overflow_nor_vanish() -> None:
    queries, bank = some_features(50), some_features(61, seed=1)
    nearest = predicted(queries, bank, neighbours=1)
    for cold in (1e-30, 1e-6):  # exp(1 / temperature) would be infinite, exp(-2 / temperature) is 0
        assert torch.equal(predicted(queries, bank, neighbours=20, temperature=cold), nearest)
    hot = predicted(queries, bank, neighbours=61, temperature=1e9)
    assert hot.tolist() == [0] * 50  # the class with the most images has the most votes: 16 of 61


def test_half_precision_features_are_compared_in_fp32() -> None:
    queries, bank = some_features(40).bfloat16(), some_features(60, seed=1).bfloat16()
    assert torch.equal(predicted(queries, bank, 20), predicted(queries.float(), bank.float(), 20))


def test_no_queries_have_no_predictions() -> None:
    got = predicted(torch.empty(0, 5), some_features(9), neighbours=3)
    assert (got.dtype, got.shape) == (torch.int64, (0,))


def test_queries_in_parts_have_the_same_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, bank = some_features(40), some_features(60, seed=1)
    at_once = predicted(queries, bank, neighbours=7)
    for similarities in (60 * 7, 60, 1):  # a last part of five; one query per part
        monkeypatch.setattr("largebatch.modes.features._AT_ONCE", similarities)
        assert torch.equal(predicted(queries, bank, neighbours=7), at_once)
