"""Exponential moving average of a run's weights (``ema_decay``)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class AveragedWeights:
    """Moving average of a model's parameters and buffers.

    It begins as the initial weights ``w_0``. Step t moves it to ``decay * average + (1 - decay) * w_t``. Buffers that
    aren't floating-point numbers, such as counters, are copied. torch has the arithmetic; its ``AveragedModel`` isn't
    used, because its step counter would let the host wait for a GPU in each step.

    Args:
        model: the model, on its device, with its initial weights.
        decay: part of the average that a step keeps.

    Attributes:
        model: a copy of the model with the averages, for evaluation only.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self._move = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights of ``model``, after an optimizer step."""
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        moved = [pair for pair in pairs if pair[0].is_floating_point()]
        self._move([average for average, _ in moved], [now.detach() for _, now in moved], 0)
        for average, now in pairs:
            if not average.is_floating_point():
                average.copy_(now)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
