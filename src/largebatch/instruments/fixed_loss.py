"""The loss over a fixed batch as a function of a network's parameters, with its first and second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from largebatch.machine import distributed
from largebatch.machine.memory import is_out_of_memory
from largebatch.machine.pulse import progressed

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]  # mean loss of a network over images and labels


class FixedLoss:
    """The mean loss over a fixed batch that all processes share, as a function of the trained parameters.

    The network computes in fp32, without compilation, in evaluation mode: dropout is off, and batch norm takes its
    running statistics. Parameters, gradients and products are vectors in fp64, [n], in the order of the names. They
    are the same in every process.

    Args:
        network: a copy of the trained model, for this object alone.
        names: names of the trained parameters.
        loss: the mean loss over images.
        images: images of this process's part of the batch, maybe none.
        labels: their labels.
        total: number of images of all processes.
        size: images per pass. Halved when memory runs out.
    """

    def __init__(
        self,
        network: nn.Module,
        names: Sequence[str],
        loss: Loss,
        images: Tensor,
        labels: Tensor,
        total: int,
        size: int,
    ) -> None:
        self._network, self._loss = network.requires_grad_(False).eval(), loss
        every = dict(network.named_parameters())
        self._parameters = [every[name].requires_grad_() for name in names]
        self._images, self._labels, self.total, self._size = images, labels, total, size
        self.length = sum(p.numel() for p in self._parameters)
        self.device = self._parameters[0].device

    def move_to(self, model: nn.Module) -> None:
        """Take the parameters and buffers of ``model``. The buffers of rank 0 count."""
        self._network.load_state_dict(model.state_dict())
        distributed.share_buffers(self._network)

    def parameters(self) -> Tensor:
        return self._flat(self._parameters)

    def value(self) -> float:
        with torch.no_grad():
            return self._sum(lambda loss: loss.double()[None], 1).item()

    def value_at(self, step: Tensor) -> float:
        """Return the value at the parameters plus ``step``."""
        before = [p.detach().clone() for p in self._parameters]
        with torch.no_grad():
            for parameter, move in zip(self._parameters, self._shaped(step), strict=True):
                parameter += move
            found = self.value()
            for parameter, saved in zip(self._parameters, before, strict=True):
                parameter.copy_(saved)
        return found

    def gradient(self) -> Tensor:
        return self._sum(
            lambda loss: self._flat(torch.autograd.grad(loss, self._parameters, allow_unused=True)), self.length
        )

    def product(self, vector: Tensor) -> Tensor:
        """Return the product of the Hessian and ``vector``."""
        shaped = self._shaped(vector)

        def of_pass(loss: Tensor) -> Tensor:
            gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True, create_graph=True)
            pairs = zip(gradients, shaped, strict=True)
            along = [(g * v).sum() for g, v in pairs if g is not None and g.requires_grad]
            if not along:  # a linear loss
                return vector.new_zeros(self.length)
            # Not autograd.grad: it skips, without an error, functions that can be differentiated only once.
            self._network.zero_grad(set_to_none=True)  # of a pass that ran out of memory
            torch.autograd.backward(torch.stack(along).sum())
            found = self._flat([p.grad for p in self._parameters])
            self._network.zero_grad(set_to_none=True)
            return found

        return self._sum(of_pass, self.length)

    def _sum(self, of_pass: Callable[[Tensor], Tensor], length: int) -> Tensor:
        """Return the sum of ``of_pass`` over the parts of the batch, fp64 [length], over all processes."""
        while True:
            here, fits = torch.zeros(length, dtype=torch.float64, device=self.device), True
            try:
                for loss in self._losses():
                    here += of_pass(loss)
            except (RuntimeError, MemoryError) as error:
                if self._size == 1 or not is_out_of_memory(error):
                    raise
                fits = False
            if not distributed.any_process(not fits):
                return distributed.sum_over_processes(here)
            self._size = max(self._size // 2, 1)

    def _losses(self) -> Iterator[Tensor]:
        """Yield the loss of each part of the batch, as its share of the mean over the batch."""
        for first in range(0, len(self._labels), self._size):
            part = slice(first, first + self._size)
            images, labels = progressed((self._images[part], self._labels[part]))
            with _twice_differentiable(self.device):
                loss = self._loss(self._network, images, labels) * (len(labels) / self.total)
            yield loss

    def _flat(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return one vector of tensors in the parameters' shapes; None counts as zeros."""
        pairs = zip(tensors, self._parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if t is None else t).detach().flatten() for t, p in pairs]).double()

    def _shaped(self, vector: Tensor) -> list[Tensor]:
        parts = torch.split(vector.float(), [p.numel() for p in self._parameters])
        return [part.view(p.shape) for part, p in zip(parts, self._parameters, strict=True)]


@contextmanager
def _twice_differentiable(device: torch.device) -> Iterator[None]:
    """Compute in fp32, with the attention that has second derivatives."""
    with torch.autocast(device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        yield
