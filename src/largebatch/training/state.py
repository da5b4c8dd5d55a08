"""State of a run in one process: the constant part, and the part that training changes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from largebatch.config.batch import BatchPlan
from largebatch.config.batch_schedule import Stage
from largebatch.config.epochs import Epochs
from largebatch.config.schema import Config
from largebatch.data import BatchLoader, Data
from largebatch.instruments.fixed_loss import FixedLoss
from largebatch.instruments.gradient_noise import GradientNoise
from largebatch.machine import distributed
from largebatch.machine.precision import Arithmetic
from largebatch.optim import SampleNorms
from largebatch.runs.folder import RunFolder
from largebatch.runs.metrics import Row
from largebatch.training.averaging import AveragedWeights, ScheduleFreeWeights
from largebatch.training.graphs import Graphs
from largebatch.training.loss_scale import LossScale
from largebatch.training.running_statistics import RunningStatistics
from largebatch.training.stop import EarlyStopping

# Keys of every checkpoint.
STATE = (
    "model", "optimizer", "schedule", "loss_scale", "unlogged", "seconds", "best", "early_stopping", "micro_batch",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Constant part of a run's state, except ``batch``: ``micro_batch=auto`` may make its micro-batches smaller."""

    config: Config
    folder: RunFolder
    rank: int
    processes: int
    device: torch.device
    data: Data
    batch: BatchPlan
    epochs: Epochs
    steps: int  # of the main training, with mode=bt of the pre-training; before a norm test the most possible number
    arithmetic: Arithmetic

    @property
    def autocast(self) -> torch.autocast:
        return self.arithmetic.autocast(self.device)

    @property
    def exact(self) -> bool:
        """True if the loss is a function of the global batch and not a mean over images (``mode.exact``)."""
        return self.config.mode.loss_over_global_batch

    @property
    def within_memory(self) -> bool:
        """True if a step that runs out of memory is repeated with smaller micro-batches.

        False with batch norm, whose statistics would change, and with a loss over several processes, whose forward
        passes wait for each other.
        """
        tied = self.config.batch_norm_size is not None or (self.processes > 1 and self.exact)
        return self.config.micro_batch == "auto" and not tied

    @property
    def averages_afterwards(self) -> bool:
        """True if processes average their gradients after the backward pass, not during it as in DDP."""
        return self.within_memory or self.exact

    @property
    def loader(self) -> BatchLoader:
        data, last = self.data, self.arithmetic.channels_last
        ranks = self.rank, self.processes
        return BatchLoader(self.config.dataset, data.mean, data.std, self.device, *ranks, last, data.times)

    def with_micro_batch(self, size: int) -> Run:
        return replace(self, batch=replace(self.batch, micro_batch=size))


class Unlogged:
    """Steps since the last row of metrics.

    The totals of each step are kept apart, because a run that diverges writes a row for each step. They stay on the
    device, because reading them waits for it.

    Attributes:
        rows: position and learning rates of each step; the gradient's norm is a tensor, 0-dimensional.
        totals: the mode's totals of each step, of this process; float64 of shape [steps, mode.TOTALS].
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.rows: list[Row] = []
        self.totals = torch.empty(0, count, dtype=torch.float64, device=device)

    def add(self, row: Row, totals: Tensor) -> None:
        self.rows.append(row)
        self.totals = torch.cat([self.totals, totals[None]])

    def take(self) -> tuple[list[Row], list[list[float]]]:
        """Return the rows and the totals over all processes, and forget them. Waits for the device."""
        totals = distributed.sum_over_processes(self.totals).tolist()
        rows = [{k: v.item() if isinstance(v, Tensor) else v for k, v in row.items()} for row in self.rows]
        self.rows, self.totals = [], self.totals.new_empty(0, self.totals.shape[1])
        return rows, totals


@dataclass
class ProbeState:
    """State of the phase after pre-training."""

    head: nn.Linear
    optimizer: torch.optim.SGD
    lrs: list[float]  # initial learning rates of the optimizer's groups
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
    """Changing part of a run's state. ``state`` returns the content of a checkpoint."""

    model: nn.Module
    replica: nn.Module  # the model, or the backbone with mode.exact, with gradients averaged over processes
    network: Callable[[Tensor], Tensor]  # the replica, compiled or not
    graphs: Graphs  # of the passes
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    loss_scale: LossScale
    norms: SampleNorms | None  # measures gradients for CLARS, VR-LARS and VR-LAMB
    statistics: RunningStatistics  # of the network's batch norm
    unlogged: Unlogged
    early_stopping: EarlyStopping
    noise: GradientNoise | None = None  # only with instruments.noise_scale or batch_schedule.shape=norm_test
    growing: Epochs | None = None  # the run's, only with batch_schedule.shape=norm_test: training lets batches grow
    fixed_loss: FixedLoss | None = None  # only with instruments.sharpness_every
    # Only with ema_decay or a schedule-free optimizer, and not while a probe trains.
    averaged: AveragedWeights | ScheduleFreeWeights | None = None
    probe: ProbeState | None = None  # only with mode=bt
    step: int = 0
    seconds: float = 0.0  # wall time of the run's earlier processes
    best: float = -math.inf  # validation accuracy of the best checkpoint

    @property
    def result(self) -> nn.Module:
        """The model whose metrics count: the averaged model, if there is an average."""
        return self.averaged.model if self.averaged else self.model

    @property
    def modules(self) -> list[nn.Module]:
        """All modules with weights of the run."""
        averaged = [self.averaged.model] if self.averaged else []
        return [self.model, *averaged, *([self.probe.head] if self.probe else [])]

    def checksum(self) -> str:
        """Return the CRC-32 of all parameters and buffers, in hex. Waits for the device."""
        found = 0
        for tensor in (tensor for module in self.modules for tensor in module.state_dict().values()):
            found = zlib.crc32(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy(), found)
        return f"{found:08x}"

    def state(self, seconds: float) -> dict[str, Any]:
        return (
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "loss_scale": self.loss_scale.state(),
                "unlogged": {"rows": self.unlogged.rows, "totals": self.unlogged.totals},
                "seconds": seconds,
                "best": self.best,
                "early_stopping": self.early_stopping.state(),
            }
            | ({"stages": [list(stage) for stage in self.growing.stages]} if self.growing else {})
            | ({"averaged": self.averaged.model.state_dict()} if self.averaged else {})
            | ({"probe": self.probe.state()} if self.probe else {})
            # Last, because the number of its tensors changes, and a copy in the memory of the last one goes by place.
            | ({"noise": self.noise.state()} if self.noise else {})
        )

    def load(self, saved: dict[str, Any], rank: int) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.loss_scale.load(saved["loss_scale"])
        self.early_stopping.load(saved["early_stopping"])
        self.unlogged.rows, totals = saved["unlogged"]["rows"], saved["unlogged"]["totals"]
        # Saved totals are sums over processes, and will be summed again.
        self.unlogged.totals = totals if rank == 0 else torch.zeros_like(totals)
        if self.noise and "noise" in saved:  # a run may be resumed with another choice of instruments
            self.noise.load(saved["noise"], rank)
        if self.growing:
            self.growing.stages = tuple(Stage(*stage) for stage in saved["stages"])
        if self.averaged and "averaged" in saved:  # a checkpoint of a probe has none
            self.averaged.model.load_state_dict(saved["averaged"])
        if self.probe:
            self.probe.load(saved["probe"], rank)
        self.step, self.seconds, self.best = saved["step"], saved["seconds"], saved["best"]
