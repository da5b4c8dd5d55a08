"""Loss scaling for fp16: gradients far below 1 would be zero in fp16."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

_LEAST = 2.0**-24  # the smallest positive fp16 number: gradients that overflow at this scale aren't finite


class LossScale:
    """Factor of the loss, by which the gradients are divided before the step. Without ``enabled``, the factor is 1.

    ``torch.amp.GradScaler`` chooses the factor, a power of two: it begins at 65,536, is halved when a gradient isn't
    finite, and doubled after 2,000 finite steps. An optimizer step with a gradient that isn't finite is skipped. It
    counts as a step of the run: the schedule goes on and its images aren't repeated. It is no step of the optimizer:
    moments and the optimizer's own clock stay. Processes have equal gradients and so skip the same steps.

    With fp16, each step waits for the device, to read the factor.

    Attributes:
        value: the factor.
        skipped: optimizer steps skipped so far.
        taken: True if the latest step wasn't skipped.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self._scaler = torch.amp.GradScaler(device.type, enabled=enabled)
        self._scaler.scale(torch.zeros((), device=device))  # else it has no factor before its first loss
        self.enabled, self.value, self.skipped, self.taken = enabled, self._scaler.get_scale(), 0, True
        if enabled:  # torch warns when the optimizer skips the step before the schedule's first step
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")

    @property
    def vanished(self) -> bool:
        """True if gradients aren't finite at any scale."""
        return self.enabled and self.value < _LEAST

    def scaled(self, loss: Tensor) -> Tensor:
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the factor, once before ``step``."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Take an optimizer step and adjust the factor. Return False if the step was skipped."""
        before = self.value
        self._scaler.step(optimizer)
        self._scaler.update()
        self.value = self._scaler.get_scale()
        self.taken = self.value >= before
        self.skipped += not self.taken
        return self.taken

    def metrics(self) -> dict[str, float]:
        """Return the factor of the next step and the number of skipped steps; empty unless enabled."""
        return {"optim/loss_scale": self.value, "optim/skipped_steps": self.skipped} if self.enabled else {}

    def state(self) -> dict[str, Any]:
        return {"scaler": self._scaler.state_dict(), "skipped": self.skipped}

    def load(self, saved: dict[str, Any]) -> None:
        if self.enabled:
            self._scaler.load_state_dict(saved["scaler"])
        self.value = self._scaler.get_scale()
        self.skipped = saved["skipped"]
