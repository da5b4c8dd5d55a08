"""A weighted nearest-neighbour classifier on features: what frozen features are worth, without training anything."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_AT_ONCE = 1 << 24  # similarities


def knn_predictions(
    queries: Tensor, bank: Tensor, labels: Tensor, classes: int, *, neighbours: int, temperature: float
) -> Tensor:
    """The class of each query by a vote of its nearest neighbours in ``bank``.

    Each of the ``neighbours`` with the largest cosine similarity s votes for its own class with the weight
    ``exp(s / temperature)`` (Wu et al., arXiv 1805.01978).

    Args:
        queries: [Q, F].
        bank: [N, F].
        labels: int64 [N], of ``bank``.
        neighbours: all of the bank, where that has fewer.

    Returns:
        int64 [Q].
    """
    bank = F.normalize(bank.float(), dim=1)
    k = min(neighbours, len(bank))
    found = []
    for part in torch.split(F.normalize(queries.float(), dim=1), max(_AT_ONCE // len(bank), 1)):
        similarity, nearest = (part @ bank.mT).topk(k, dim=1)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # a factor for all: no overflow
        votes = weights.new_zeros(len(part), classes).scatter_add_(1, labels[nearest], weights)
        found.append(votes.argmax(dim=1))
    return torch.cat(found) if found else labels.new_empty(0)
