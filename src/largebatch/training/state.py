"""A run in one of its processes: what stays the same while it trains, and what changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from largebatch.config.batch import BatchPlan, plan_batch, plan_small_batch
from largebatch.config.schema import Config
from largebatch.data import Data
from largebatch.machine.precision import Arithmetic
from largebatch.optim import SampleNorms
from largebatch.runs.folder import RunFolder


@dataclass(frozen=True)
class ProbePlan:
    """Length and batches of what follows on pre-training."""

    batch: BatchPlan
    epoch_steps: int
    epochs: int

    @property
    def steps(self) -> int:
        return self.epochs * self.epoch_steps


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
    steps: int  # of the main training, which in bt is the pre-training
    arithmetic: Arithmetic
    probe: ProbePlan | None

    @property
    def total_steps(self) -> int:
        """With those of the probe."""
        return self.steps + (self.probe.steps if self.probe else 0)

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

        Not with batch-norm statistics or a loss over several processes, which sums in the forward pass tie together.
        """
        tied = self.processes > 1 and (self.config.sync_bn or self.exact)
        return self.config.micro_batch == "auto" and not tied

    @property
    def exact(self) -> bool:
        """Whether the loss is over the global batch, where it isn't a mean over images (``mode.exact``)."""
        return bool(self.config.mode.exact)

    @property
    def averages_afterwards(self) -> bool:
        """Whether processes average their gradients after the backward pass, and not along it as DDP does."""
        return self.within_memory or self.exact

    def evaluates_after(self, step: int) -> bool:
        """Whether the model is evaluated after ``step``; features that are being trained also before the first."""
        mode, every = self.config.mode, self.config.eval_every
        if mode.knn_every is not None:
            every = mode.knn_every
            if step == 0 or every == 0:
                return every > 0
        return step == self.steps or (step > 0 and step % (every * self.epoch_steps) == 0)

    def with_micro_batch(self, size: int) -> Run:
        batch, probe = plan_batch(self.batch.global_batch, self.processes, size), self.probe
        if probe:
            whole = probe.batch.global_batch
            probe = replace(probe, batch=plan_small_batch(whole, whole, self.processes, size))
        return replace(self, batch=batch, probe=probe)


@dataclass
class Probe:
    """The part of ``Training`` that follows on pre-training."""

    head: nn.Linear
    optimizer: torch.optim.SGD
    rates: list[float]  # of its groups, before their schedule
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
    """What changes; ``state`` is what a checkpoint holds of it."""

    model: nn.Module
    replica: nn.Module  # the same, with gradients averaged over the processes; with mode.exact the backbone alone
    network: Callable[[Tensor], Tensor]  # the replica as training calls it, compiled or not
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    norms: SampleNorms | None  # what CLARS divides by
    totals: Tensor  # of this process, since the last logged row
    probe: Probe | None  # what follows on pre-training
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
        if rank == 0:  # they are of all processes, and will be summed over all again
            self.totals.copy_(saved["totals"])
        if self.probe:
            self.probe.load(saved["probe"], rank)
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.best = saved.get("best", -math.inf)  # earlier versions' checkpoints have none
