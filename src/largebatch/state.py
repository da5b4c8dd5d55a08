"""A run in one of its processes: what stays the same while it trains, and what changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from largebatch.arithmetic import Arithmetic
from largebatch.batch import BatchPlan, plan_batch
from largebatch.config import Config
from largebatch.data import Data
from largebatch.optim import SampleNorms
from largebatch.run_folder import RunFolder


@dataclass(frozen=True)
class Run:
    """What stays the same, apart from ``batch``: with ``micro_batch=auto`` its micro-batches may become smaller."""

    config: Config
    folder: RunFolder
    rank: int
    processes: int
    device: torch.device
    mode: ModuleType
    data: Data
    batch: BatchPlan
    epoch_steps: int  # optimizer steps an epoch
    steps: int  # in all
    arithmetic: Arithmetic

    @property
    def autocast(self) -> torch.autocast:
        return self.arithmetic.autocast(self.device)

    @property
    def sample_size(self) -> int:
        """Samples that must not be spread over micro-batches."""
        return self.config.optimizer.sample_size or 1

    @property
    def within_memory(self) -> bool:
        """Whether a step that runs out of memory is taken again in smaller micro-batches.

        Not with batch-norm statistics over several processes, which sums in the forward pass tie together.
        """
        return self.config.micro_batch == "auto" and not (self.config.sync_bn and self.processes > 1)

    def with_micro_batch(self, size: int) -> Run:
        return replace(self, batch=plan_batch(self.batch.global_batch, self.processes, size))


@dataclass
class Training:
    """What changes; ``state`` is what a checkpoint holds of it."""

    model: nn.Module
    replica: nn.Module  # the same, with gradients averaged over the processes
    network: Callable[[Tensor], Tensor]  # the replica as training calls it, compiled or not
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    norms: SampleNorms | None  # what CLARS divides by
    totals: Tensor  # of this process, since the last logged row
    step: int = 0
    seconds: float = 0.0  # wall time of the parts before this one

    def state(self, seconds: float) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "totals": self.totals,
            "seconds": seconds,
        }

    def load(self, saved: dict[str, Any], rank: int) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        if rank == 0:  # they are of all processes, and will be summed over all again
            self.totals.copy_(saved["totals"])
        self.step, self.seconds = saved["step"], saved["seconds"]
