"""Whether embeddings have collapsed: to a point, or into a few dimensions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_deviation(embeddings: Tensor) -> Tensor:
    """The mean over dimensions of the standard deviation of ``embeddings`` [n, D] of length 1, times sqrt(D).

    1 where they point everywhere alike, 0 where all are the same.
    """
    directions = F.normalize(embeddings.float(), dim=1)
    mean: Tensor = directions.std(dim=0, correction=0).mean() * embeddings.shape[1] ** 0.5
    return mean


def effective_rank(embeddings: Tensor) -> Tensor:
    """In how many dimensions ``embeddings`` [n, D] vary: the exponential of the entropy of their singular values.

    The values are those of the embeddings without their mean, divided by their sum (Roy and Vetterli, 2007). Between 1
    and ``min(n - 1, D)``; 0 where nothing varies, NaN where an embedding isn't finite.
    """
    centred = embeddings.double() - embeddings.double().mean(dim=0)
    if not bool(centred.isfinite().all()):  # eigvalsh would refuse them
        return centred.new_tensor(torch.nan)
    n, width = centred.shape
    gram = centred @ centred.mT if n < width else centred.mT @ centred
    squares = torch.linalg.eigvalsh(gram)
    rounding = squares.max() * len(squares) * torch.finfo(torch.float64).eps
    values = torch.where(squares > rounding, squares, 0).sqrt()  # the null space's, which can be below 0
    total = values.sum()
    shares = torch.where(total > 0, values / total, 0)
    return torch.where(total > 0, torch.special.entr(shares).sum().exp(), 0)
