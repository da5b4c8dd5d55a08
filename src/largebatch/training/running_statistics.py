"""Running statistics of batch norm that don't depend on the number of processes or on accumulation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from largebatch.machine import distributed
from largebatch.models.weights import is_frozen


class RunningStatistics:
    """Running statistics of a network, moved once per optimizer step.

    A pass over one group of images moves a running statistic r to ``r + momentum * (s - r)``, with the group's
    statistic s. Here every pass of a step starts from the same r, and the mean over all groups of the step is kept:
    ``r + momentum * (mean(s) - r)``.

    Args:
        network: the network, on its device. Without batch norm, the methods do nothing.
        over_processes: True if the processes have different groups. False with ``sync_bn``: they share all groups.
    """

    def __init__(self, network: nn.Module, over_processes: bool) -> None:
        layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm) and not is_frozen(layer)]
        values = [value for layer in layers for value in (layer.running_mean, layer.running_var)]
        self._values = [value for value in values if value is not None]
        self._counts = [layer.num_batches_tracked for layer in layers if layer.num_batches_tracked is not None]
        self._over_processes = over_processes and distributed.processes() > 1

    @torch.no_grad()
    def begin(self, groups: int) -> None:
        """Begin an optimizer step over ``groups`` groups of images in all processes."""
        self._groups = groups
        self._averages = bool(self._values) and (groups > 1 or self._over_processes)
        if self._averages:
            self._counted = torch.stack(self._counts)
            self._before = self._read()
            self._total = torch.zeros_like(self._before)

    @torch.no_grad()
    def after_pass(self) -> None:
        """Collect the statistics of a pass, after its backward pass, which may need them unchanged."""
        if self._averages:
            self._total += self._read()
            self._write(self._before)

    @torch.no_grad()
    def end(self) -> None:
        """Keep the mean over the step's groups. Every process must call this."""
        if self._averages:
            if self._over_processes:
                distributed.sum_over_processes(self._total)
            self._write(self._total / self._groups)

    def _read(self) -> Tensor:
        """Return all statistics and the number of passes of each layer in this step, as one vector."""
        return torch.cat([*self._values, torch.stack(self._counts) - self._counted])

    def _write(self, vector: Tensor) -> None:
        *values, passes = torch.split(vector, [*map(len, self._values), len(self._counts)])
        torch._foreach_copy_(self._values, values)
        torch._foreach_copy_(self._counts, list((self._counted + passes.round().long()).unbind()))
