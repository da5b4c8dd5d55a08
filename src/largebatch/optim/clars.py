"""CLARS: LARS whose rate is divided by the mean of the samples' gradient norms, not by the norm of their mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from largebatch.optim.lars import LarsFamily
from largebatch.optim.options import Group, is_adapted, options_of


class CLARS(LarsFamily):
    """CLARS (arXiv 2002.01576).

    For every layer, with weight ``w``, gradient ``g`` of the mean loss and ``g_i`` that of sample i (or of the i-th
    group of samples)::

        q  = trust_coefficient * ||w|| / (mean_i ||g_i|| + eps)      # 1 if either is 0
        v  = momentum * v + q * (g + weight_decay * w)
        w -= lr * v

    The mean of the norms is never below the norm of the mean, so that without decay the rate is at most that of LARS,
    and equal to it where all samples agree. Early in training they don't: that is the warm-up this optimizer has built
    in. Who trains gives the means before each step::

        optimizer = CLARS(model.named_parameters(), lr=1.0)
        norms = SampleNorms(model, sample_size=1, parameters=optimizer.layers)
        for images, labels in batches:
            optimizer.zero_grad()
            loss(model(images), labels).backward()
            optimizer.set_sample_norms(norms.means())
            optimizer.step()

    The paper's own values of momentum, decay and trust coefficient weren't available; the defaults are LARS's.

    Args:
        denominator: ``sample_norms``: ``mean_i ||g_i||``; ``sum_of_norms``: ``mean_i ||g_i|| + weight_decay * ||w||``.
            With decay, and gradients that vanish as the training set is learnt, the first lets the rate and with it the
            decay grow without a limit; the second is bounded as LARS is.
        params, lr, and all others: as in ``LARS``. ``norm_clip`` limits the weight norm and the denominator.

    Raises:
        ValueError: for a hyper-parameter out of its range, also in a parameter group.
    """

    DENOMINATORS = ("sample_norms", "sum_of_norms")

    _sample_norms: dict[Any, Tensor]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        *,
        adapt_1d: bool = False,
        decay_1d: bool = False,
        norm_clip: float | None = None,
        nesterov: bool = False,
        denominator: str = "sample_norms",
        lr_in_momentum: bool = False,
        max_ratio: float | None = None,
        larc: bool = False,
        eps: float = 0.0,
        adapt: bool | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        super().__init__(params, options_of(locals()))

    def set_sample_norms(self, means: Mapping[Any, Tensor]) -> None:
        """Give the mean norm of the samples' gradients of each layer, 0-dimensional, for the next step alone."""
        self._sample_norms.clear()  # in place, as everywhere: see LayerwiseOptimizer.step
        self._sample_norms.update(means)

    def step(self, closure: Any = None) -> Any:
        """As ``torch.optim.Optimizer.step``.

        Raises:
            RuntimeError: without the mean norm of a layer that has a gradient, and as in ``LARS``.
        """
        loss = super().step(closure)
        self._sample_norms.clear()
        return loss

    def _with_gradient(self, group: Group) -> tuple[list[Tensor], list[Tensor]]:
        parameters, gradients = super()._with_gradient(group)
        for layer in parameters:
            if is_adapted(layer, group) and layer not in self._sample_norms:
                name = next(name for name, other, _ in self._named_parameters() if other is layer)
                raise RuntimeError(
                    f"CLARS has no sample norms of {name} for this step: call set_sample_norms(norms.means()), "
                    "with norms = SampleNorms(model, ...), between backward() and step()"
                )
        return parameters, gradients

    def _given_norms(self, layers: list[Tensor]) -> Tensor | None:
        return torch.stack([self._sample_norms[layer] for layer in layers]) if layers else None

    def _forget(self) -> None:
        super()._forget()
        self._sample_norms = {}
