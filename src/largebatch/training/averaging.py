"""Averages of a run's weights: a moving average (``ema_decay``), or that of a schedule-free optimizer."""

from __future__ import annotations

import copy
from typing import Any, cast

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


class ScheduleFreeWeights:
    """Average of the weights by a schedule-free optimizer (arXiv 2405.15682), which takes gradients at other weights.

    Such an optimizer has ``train()`` and ``eval()``, which change the parameters in place, and keeps its present mode
    as ``train_mode`` of each group.

    Args:
        model: the model, on its device.
        optimizer: its optimizer.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._training, self._optimizer = model, optimizer
        self._averaged = copy.deepcopy(model).requires_grad_(False).eval()

    @staticmethod
    def fits(optimizer: torch.optim.Optimizer) -> bool:
        """Return True if the optimizer averages the weights."""
        return "train_mode" in optimizer.param_groups[0]

    @property
    def model(self) -> nn.Module:
        """The model with the present averages, for evaluation only. The next access changes it.

        ``train()`` returns to the training weights only up to rounding, so copies restore them.
        """
        optimizer = cast(Any, self._optimizer)
        parameters: list[Tensor] = list(self._training.parameters())
        before = [parameter.detach().clone() for parameter in parameters]
        if optimizer.state:  # before the first step, averages are the weights
            optimizer.eval()
        self._averaged.load_state_dict(self._training.state_dict())
        optimizer.train()
        with torch.no_grad():
            torch._foreach_copy_(parameters, before)
        return self._averaged

    def update(self, model: nn.Module) -> None:
        """Do nothing: the optimizer's step moves the average."""


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
