"""State of a run in one of its processes: what stays the same while it trains, and what changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from largebatch.config.batch import BatchPlan, plan_batch
from largebatch.config.schema import Config
from largebatch.data import BatchLoader, Data
from largebatch.machine.precision import Arithmetic
from largebatch.optim import SampleNorms
from largebatch.runs.folder import RunFolder


@dataclass(frozen=True)
class Run:
    """What stays the same, apart from ``batch``: with ``micro_batch=auto`` its micro-batches may become smaller."""

    config: Config
    folder: RunFolder
    rank: int
    processes: int
    device: torch.device
    data: Data
    batch: BatchPlan
    epoch_steps: int  # optimizer steps an epoch
    steps: int  # of the main training, which in bt is the pre-training
    arithmetic: Arithmetic

    @property
    def autocast(self) -> torch.autocast:
        return self.arithmetic.autocast(self.device)

    @property
    def exact(self) -> bool:
        """True if the loss is computed over the global batch, not as a mean over images (``mode.exact``)."""
        return self.config.mode.loss_over_global_batch

    @property
    def within_memory(self) -> bool:
        """True if a step that runs out of memory is repeated with smaller micro-batches.

        False with batch-norm statistics or a loss over several processes: sums in the forward pass tie them together.
        """
        tied = self.processes > 1 and (self.config.sync_bn or self.exact)
        return self.config.micro_batch == "auto" and not tied

    @property
    def averages_afterwards(self) -> bool:
        """True if processes average their gradients after the backward pass, and not during it as DDP does."""
        return self.within_memory or self.exact

    @property
    def loader(self) -> BatchLoader:
        data, last = self.data, self.arithmetic.channels_last
        return BatchLoader(self.config.dataset, data.mean, data.std, self.device, self.rank, self.processes, last)

    def with_micro_batch(self, size: int) -> Run:
        return replace(self, batch=plan_batch(self.batch.global_batch, self.processes, size))


@dataclass
class ProbeState:
    """The part of ``Training`` that follows pre-training."""

    head: nn.Linear
    optimizer: torch.optim.SGD
    lrs: list[float]  # of the optimizer's groups, before their schedule
    totals: Tensor  # of this process, since the last logged row

    def state(self) -> dict[str, Any]:
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict(), "totals": self.totals}

    def load(self, saved: dict[str, Any], rank: int) -> None:
        self.head.load_state_dict(saved["head"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if rank == 0:
            self.totals.copy_(saved["totals"])


@dataclass
class Training:
    """What changes; ``state`` is the part that a checkpoint holds."""

    model: nn.Module
    replica: nn.Module  # takes a micro-batch, with gradients averaged over the processes; with mode.exact the backbone
    network: Callable[[Tensor], Tensor]  # the replica as training calls it, compiled or not
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    norms: SampleNorms | None  # the norms that CLARS divides by
    totals: Tensor  # of this process, since the last logged row
    probe: ProbeState | None = None  # what follows pre-training
    step: int = 0
    seconds: float = 0.0  # wall time of the parts before this one
    best: float = -math.inf  # validation accuracy of the best checkpoint

    def state(self, seconds: float) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "totals": self.totals,
            "seconds": seconds,
            "best": self.best,
        } | ({"probe": self.probe.state()} if self.probe else {})

    def load(self, saved: dict[str, Any], rank: int) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        if rank == 0:  # the saved totals are those of all processes, and will be summed over all again
            self.totals.copy_(saved["totals"])
        if self.probe:
            self.probe.load(saved["probe"], rank)
        self.step, self.seconds, self.best = saved["step"], saved["seconds"], saved["best"]
