"""Metrics of frozen features and embeddings, without training: a nearest-neighbour classifier, and collapse."""

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


def mean_deviation(embeddings: Tensor) -> Tensor:
    """Normalise ``embeddings`` [n, D] to length 1; return their mean standard deviation per dimension, times sqrt(D).

    The result is 1 for uniformly distributed directions, and 0 for equal ones.
    """
    directions = F.normalize(embeddings.float(), dim=1)
    mean: Tensor = directions.std(dim=0, correction=0).mean() * embeddings.shape[1] ** 0.5
    return mean


def effective_rank(embeddings: Tensor) -> Tensor:
    """Return the number of dimensions in which ``embeddings`` [n, D] vary (Roy and Vetterli, 2007).

    It is the exponential of the entropy of the singular values of the centred embeddings, divided by their sum. The
    result lies between 1 and ``min(n - 1, D)``. It is 0 if nothing varies, and NaN if an embedding isn't finite.
    """
    centred = embeddings.double() - embeddings.double().mean(dim=0)
    if not bool(centred.isfinite().all()):  # eigvalsh raises an error for them
        return centred.new_tensor(torch.nan)
    n, width = centred.shape
    gram = centred @ centred.mT if n < width else centred.mT @ centred
    squares = torch.linalg.eigvalsh(gram)
    rounding = squares.max() * len(squares) * torch.finfo(torch.float64).eps
    values = torch.where(squares > rounding, squares, 0).sqrt()  # values of the null space are rounding errors
    total = values.sum()
    shares = torch.where(total > 0, values / total, 0)
    return torch.where(total > 0, torch.special.entr(shares).sum().exp(), 0)
