"""Weighted nearest-neighbour classifier, to evaluate frozen features without training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_AT_ONCE = 1 << 24  # similarities computed at once


def knn_predictions(
    queries: Tensor, bank: Tensor, labels: Tensor, classes: int, *, neighbours: int, temperature: float
) -> Tensor:
    """Predict the class of each query by a vote of its nearest neighbours in ``bank``.

    The ``neighbours`` rows with the largest cosine similarity s vote for their own classes, each with the weight
    ``exp(s / temperature)`` (Wu et al., arXiv 1805.01978).

    Args:
        queries: [Q, F].
        bank: [N, F].
        labels: int64 [N], of ``bank``.
        neighbours: number of voting rows; a bank with fewer rows votes as a whole.

    Returns:
        Classes, int64 [Q].
    """
    bank = F.normalize(bank.float(), dim=1)
    k = min(neighbours, len(bank))
    found = []
    for part in torch.split(F.normalize(queries.float(), dim=1), max(_AT_ONCE // len(bank), 1)):
        similarity, nearest = (part @ bank.mT).topk(k, dim=1)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # a common factor prevents overflow
        votes = weights.new_zeros(len(part), classes).scatter_add_(1, labels[nearest], weights)
        found.append(votes.argmax(dim=1))
    return torch.cat(found) if found else labels.new_empty(0)
