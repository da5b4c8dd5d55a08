"""CLARS: LARS divided by the mean of the samples' gradient norms instead of the norm of their mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from largebatch.optim.lars import LARS
from largebatch.optim.measured import MeasuredOptimizer
from largebatch.optim.sample_norms import SampleNorms


class CLARS(MeasuredOptimizer, LARS):
    """CLARS (arXiv 2002.01576).

    For every layer, with weight ``w``, gradient ``g`` of the mean loss and gradient ``g_i`` of sample i (or of the i-th
    group of samples)::

        q  = trust_coefficient * ||w|| / (mean_i ||g_i|| + eps)      # 1 if either is 0
        v  = momentum * v + q * (g + weight_decay * w)
        w -= lr * v

    The mean of the norms is never below the norm of the mean. Without decay ``q`` is therefore at most LARS's, and is
    equal if all samples agree. Early in training they disagree, which acts as a warm-up. The training loop sets the
    means before each step::

        optimizer = CLARS(model.named_parameters(), lr=1.0)
        norms = SampleNorms(model, sample_size=1, parameters=optimizer.layers)
        for images, labels in batches:
            optimizer.zero_grad()
            loss(model(images), labels).backward()
            optimizer.set_sample_norms(norms.means())
            optimizer.step()

    The paper's values of momentum, decay and trust coefficient weren't available; the defaults are LARS's.

    Args:
        denominator: ``sample_norms``: ``mean_i ||g_i||``; ``sum_of_norms``: ``mean_i ||g_i|| + weight_decay * ||w||``.
            As the training set is learnt, gradients vanish: with decay, ``q`` and the decay of the first form then grow
            without a limit. The second form is bounded, as LARS is.
        params, lr, and all others: as in ``LARS``. ``norm_clip`` limits the weight norm and the denominator.

    Raises:
        ValueError: for a hyper-parameter out of its range, also in a parameter group.
    """

    DENOMINATORS = ("sample_norms", "sum_of_norms")
    MEASURE = SampleNorms
    GIVEN = "sample norms"
    GIVE = "set_sample_norms"

    def __init__(
        self, params: ParamsT, lr: float | Tensor, *args: float, denominator: str = "sample_norms", **lars: Any
    ) -> None:
        super().__init__(params, lr, *args, denominator=denominator, **lars)

    def set_sample_norms(self, means: Mapping[Any, Tensor]) -> None:
        """Set the mean norm of the samples' gradients of each layer, 0-dimensional, for the next step only."""
        self.give(means)

    def _given_norms(self, layers: list[Tensor]) -> Tensor | None:
        return torch.stack([self._given[layer] for layer in layers]) if layers else None
