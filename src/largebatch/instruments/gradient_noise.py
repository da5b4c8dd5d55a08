"""Squared norms of gradients in the training loop, noise scales, and the cosine of successive gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.instruments.noise_scale import MEMORY, Interval, PairedMeans, two_batch
from largebatch.machine import distributed
from largebatch.runs.metrics import Row


class GradientNoise:
    """The gradient noise scale of a model, from the passes that training makes anyway.

    Each pass of each process is a small batch, and the batch of the step is the large batch. Hooks keep the gradients
    of a pass until its end, on a CPU only their norms. The gradient of every second step is compared with a copy of the
    gradient before, so that no gradient is in two cosines and these are independent. The copy needs the memory of one
    set of gradients, and the hooks on a GPU that of another. The numbers stay on the device until ``take``, because
    reading them waits for it.

    Args:
        model: the model, on its device; freeze parameters before.
        cosine: compare successive gradients.

    Attributes:
        active: True to keep the gradients of the next passes.
    """

    def __init__(self, model: nn.Module, cosine: bool = True) -> None:
        self._buffers = list(model.buffers())
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._parameters = [p for _, p in trained]
        self._layers = [(place, name) for place, (name, p) in enumerate(trained, start=1) if p.ndim > 1]
        # Of the whole network, and of each parameter. A cosine takes two steps.
        self._scale, self._cosine = PairedMeans(1 + len(trained)), PairedMeans(1 + len(trained), MEMORY // 2)
        self._held: dict[int, Tensor] = {}
        self._small: Tensor | None = None  # [parameters], the sum over this process's passes of the step
        # Of the steps since ``take``: sums over this process's small batches, and the large batch; fp64.
        device = self._parameters[0].device
        self._none = torch.empty(0, len(trained), dtype=torch.float64, device=device)
        self.small, self._large = self._none.clone(), self._none.clone()
        self._sizes: list[tuple[int, int]] = []  # images of a small batch and of the large batch
        # The gradient of the step before, its squared norms if it is to be compared, and the factor of its loss; and of
        # the compared steps since ``take`` the dot product and the product of the norms.
        self._before = [torch.empty_like(p) for p in self._parameters] if cosine else []
        self._before_squares: Tensor | None = None
        self._before_scale = 1.0
        self._no_pair = torch.empty(0, 1 + len(trained), 2, dtype=torch.float64, device=device)
        self._pairs = self._no_pair.clone()
        self.active = False
        for place, parameter in enumerate(self._parameters):
            parameter.register_hook(partial(self._hold, place))  # type: ignore[no-untyped-call]

    def _hold(self, place: int, gradient: Tensor) -> None:
        if self.active:  # on a CPU its norm, so that its memory, still in the cache, is free for the next gradient
            self._held[place] = gradient if gradient.is_cuda else torch.linalg.vector_norm(gradient)

    def of_pass(self) -> tuple[Tensor, ...]:
        """Return the squared norms of the gradients of one pass, [parameters], if ``active``; and forget them."""
        if not self.active:
            return ()
        held = [self._held.pop(place, None) for place in range(len(self._parameters))]
        return (_squares(held, self.small.device),)

    def of_loss(self, loss: Callable[[], Tensor]) -> Tensor:
        """Return the squared norms of the gradients of ``loss()``. Buffers and random state stay the same."""
        before = [buffer.clone() for buffer in self._buffers]
        device = self.small.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            gradients = torch.autograd.grad(loss(), self._parameters, allow_unused=True)
        for buffer, saved in zip(self._buffers, before, strict=True):
            buffer.copy_(saved)
        return _squares(gradients, device)

    def begin(self, active: bool) -> None:
        """Begin a step, maybe again after it ran out of memory."""
        self.active, self._small = active, None
        self._held.clear()

    @torch.no_grad()
    def add(self, squares: Tensor) -> None:
        """Add the squared norms of a small batch of this process."""
        self._small = squares.double() if self._small is None else self._small + squares.double()

    def end(self, small_batch: int, large_batch: int, factor: float, loss_scale: float) -> None:
        """End a step, with the gradient of the large batch in the parameters.

        Without measured small batches, or if the only small batch is the large batch, only compare it.

        Args:
            small_batch, large_batch: numbers of images.
            factor: factor of the sum over this process's small batches, so that the sum over processes is the mean
                squared norm of the gradient of a small batch's mean loss.
            loss_scale: factor of the loss.
        """
        self.active = False
        large = _squares([p.grad for p in self._parameters], self.small.device).double()
        if self._before:
            self._compare(large, loss_scale)
        if self._small is None or small_batch == large_batch:
            return
        self.small = torch.cat([self.small, (self._small * (factor / loss_scale**2))[None]])
        self._large = torch.cat([self._large, (large / loss_scale**2)[None]])
        self._sizes.append((small_batch, large_batch))
        self._small = None

    @torch.no_grad()
    def _compare(self, squares: Tensor, loss_scale: float) -> None:
        """Compare the gradient with the step before, or copy it for the next step.

        Args:
            squares: squared norms of the gradient, fp64 [parameters].
        """
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        if self._before_squares is None:
            torch._foreach_copy_(self._before, gradients)
            self._before_squares, self._before_scale = squares, loss_scale
            return
        torch._foreach_sub_(self._before, gradients)
        both = torch.stack([_with_total(one) for one in (self._before_squares, squares)])
        # |g - h|^2 = |g|^2 + |h|^2 - 2 g.h
        dots = (both.sum(0) - _with_total(_squares(self._before, squares.device).double())) / 2
        pairs = torch.stack([dots, both.prod(0).sqrt()], dim=-1) / (self._before_scale * loss_scale)
        self._pairs = torch.cat([self._pairs, pairs[None]])
        self._before_squares = None

    def latest(self) -> tuple[float, float]:
        """Return, from the last step alone, tr(S) and the squared norm of the large batch's gradient.

        Both are of the whole network. Every process must call this. Waits for the device.
        """
        small, large = distributed.sum_over_processes(self.small[-1].sum()), self._large[-1].sum()
        trace = two_batch(small, large, *self._sizes[-1])[0]
        return trace.item(), large.item()

    def take(self) -> Row:
        """Return noise scales, variances and cosines as metrics. Every process must call this. Waits for the device.

        A number that the steps don't determine is left out: an estimate if ``|G|^2`` isn't positive, and an upper limit
        if ``|G|^2`` can't be distinguished from 0.
        """
        if self._sizes:
            small, large = distributed.sum_over_processes(self.small).cpu(), self._large.cpu()
            for one, whole, sizes in zip(small, large, self._sizes, strict=True):
                self._scale.add(two_batch(_with_total(one), _with_total(whole), *sizes))
            self.small, self._large, self._sizes = self._none.clone(), self._none.clone(), []
        for pair in self._pairs.cpu():
            self._cosine.add(pair)
        self._pairs = self._no_pair.clone()
        row: Row = {}
        if scale := self._scale.noise_scales():
            row |= self._named("scale", "", scale.value, scale)
            row |= self._named("variance", "_variance", self._scale.numerators)
        if cosine := self._cosine.cosines():
            row |= self._named("cosine", "_cosine", cosine.value, cosine)
        return row

    def _named(self, name: str, end: str, value: Tensor, limits: Interval | None = None) -> Row:
        """Return the finite numbers of the network as ``noise/``, and of each layer as ``noise_layers/LAYER``."""
        numbers = {"": value} | ({"_low": limits.low, "_high": limits.high} if limits else {})
        places = [(0, f"noise/{name}"), *((at, f"noise_layers/{layer}{end}") for at, layer in self._layers)]
        return {
            f"{key}{limit}": number
            for at, key in places
            for limit, values in numbers.items()
            if math.isfinite(number := values[at].item())
        }

    def state(self) -> dict[str, Any]:
        compared = self._before_squares is not None
        return {
            "scale": self._scale.state(),
            "cosine": self._cosine.state(),
            "small": self.small,
            "large": self._large,
            "sizes": self._sizes,
            "pairs": self._pairs,
            "before": self._before if compared else [],
            "before_squares": self._before_squares,
            "before_scale": self._before_scale,
        }

    def load(self, saved: dict[str, Any], rank: int) -> None:
        self._scale.load(saved["scale"])
        self._cosine.load(saved["cosine"])
        # Saved sums are sums over processes, and will be summed again.
        self.small = saved["small"] if rank == 0 else torch.zeros_like(saved["small"])
        self._large, self._sizes, self._pairs = saved["large"], saved["sizes"], saved["pairs"]
        self._before_squares, self._before_scale = saved["before_squares"], saved["before_scale"]
        for tensor, before in zip(self._before, saved["before"], strict=False):  # none if nothing is to be compared
            tensor.copy_(before)


def _squares(gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Return the squared norm of each gradient, fp32 [parameters]; 0 without a gradient."""
    found = [gradient.detach() for gradient in gradients if gradient is not None]
    norms = iter(torch._foreach_norm(found) if found else ())
    zero = torch.zeros((), device=device)
    return torch.stack([zero if g is None else next(norms).float() for g in gradients]).square()


def _with_total(squares: Tensor) -> Tensor:
    """Return squared norms [parameters] with their sum, that of the whole network, in front."""
    return torch.cat([squares.sum()[None], squares])
