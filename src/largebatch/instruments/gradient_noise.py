"""Squared norms of gradients in the training loop, and the noise scales that follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.instruments.noise_scale import NoiseScale, two_batch
from largebatch.machine import distributed
from largebatch.runs.metrics import Row


class GradientNoise:
    """The gradient noise scale of a model, from the passes that training makes anyway.

    Each pass of each process is a small batch, and the batch of the step is the large batch. Hooks keep the gradients
    of a pass until its end, so the instrument needs memory for a second set of gradients. The squared norms stay on the
    device until ``take``, because reading them waits for it.

    Args:
        model: the model, on its device; freeze parameters before.

    Attributes:
        active: True to keep the gradients of the next passes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = list(model.buffers())
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._parameters = [p for _, p in trained]
        self._layers = [(place, name) for place, (name, p) in enumerate(trained, start=1) if p.ndim > 1]
        self._scale = NoiseScale(1 + len(trained))  # of the whole network, and of each parameter
        self._held: dict[int, Tensor] = {}
        self._small: Tensor | None = None  # [parameters], the sum over this process's passes of the step
        # Of the steps since ``take``: sums over this process's small batches, and the large batch; fp64.
        device = self._parameters[0].device
        self._none = torch.empty(0, len(trained), dtype=torch.float64, device=device)
        self.small, self._large = self._none.clone(), self._none.clone()
        self._sizes: list[tuple[int, int]] = []  # images of a small batch and of the large batch
        self.active = False
        for place, parameter in enumerate(self._parameters):
            parameter.register_hook(partial(self._hold, place))  # type: ignore[no-untyped-call]

    def _hold(self, place: int, gradient: Tensor) -> None:
        if self.active:
            self._held[place] = gradient

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

        Without measured small batches, or if the only small batch is the large batch, do nothing.

        Args:
            small_batch, large_batch: numbers of images.
            factor: factor of the sum over this process's small batches, so that the sum over processes is the mean
                squared norm of the gradient of a small batch's mean loss.
            loss_scale: factor of the loss.
        """
        self.active = False
        if self._small is None or small_batch == large_batch:
            return
        large = _squares([p.grad for p in self._parameters], self.small.device).double()
        self.small = torch.cat([self.small, (self._small * (factor / loss_scale**2))[None]])
        self._large = torch.cat([self._large, (large / loss_scale**2)[None]])
        self._sizes.append((small_batch, large_batch))
        self._small = None

    def latest(self) -> tuple[float, float]:
        """Return, from the last step alone, tr(S) and the squared norm of the large batch's gradient.

        Both are of the whole network. Every process must call this. Waits for the device.
        """
        small, large = distributed.sum_over_processes(self.small[-1].sum()), self._large[-1].sum()
        trace = two_batch(small, large, *self._sizes[-1])[0]
        return trace.item(), large.item()

    def take(self) -> Row:
        """Return the noise scales as metrics. Every process must call this. Waits for the device.

        A number that the steps don't determine is left out: an estimate if ``|G|^2`` isn't positive, and an upper limit
        if ``|G|^2`` can't be distinguished from 0.
        """
        if self._sizes:
            small, large = distributed.sum_over_processes(self.small).cpu(), self._large.cpu()
            for one, whole, sizes in zip(small, large, self._sizes, strict=True):
                self._scale.add(two_batch(_with_total(one), _with_total(whole), *sizes))
            self.small, self._large, self._sizes = self._none.clone(), self._none.clone(), []
        found = self._scale.interval()
        if found is None:
            return {}
        row: Row = {}
        for place, name in [(0, "noise/scale"), *((at, f"noise_layers/{layer}") for at, layer in self._layers)]:
            limits = {"": found.scale, "_low": found.low, "_high": found.high}
            row |= {f"{name}{end}": value for end, of in limits.items() if math.isfinite(value := of[place].item())}
        return row

    def state(self) -> dict[str, Any]:
        return {"scale": self._scale.state(), "small": self.small, "large": self._large, "sizes": self._sizes}

    def load(self, saved: dict[str, Any], rank: int) -> None:
        self._scale.load(saved["scale"])
        # Saved sums are sums over processes, and will be summed again.
        self.small = saved["small"] if rank == 0 else torch.zeros_like(saved["small"])
        self._large, self._sizes = saved["large"], saved["sizes"]


def _squares(gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Return the squared norm of each gradient, fp32 [parameters]; 0 without a gradient."""
    found = [gradient.detach() for gradient in gradients if gradient is not None]
    norms = iter(torch._foreach_norm(found) if found else ())
    zero = torch.zeros((), device=device)
    return torch.stack([zero if g is None else next(norms).float() for g in gradients]).square()


def _with_total(squares: Tensor) -> Tensor:
    """Return squared norms [parameters] with their sum, that of the whole network, in front."""
    return torch.cat([squares.sum()[None], squares])
