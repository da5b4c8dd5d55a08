"""The gradient of Barlow Twins' loss over a global batch, on devices that hold a micro-batch (``mode.exact``).

Two passes over the same micro-batches. The first, without gradients, collects the outputs of backbone and first layer
of the projector. The loss over the global batch follows from them, and its gradient with respect to them
(``global_loss.py``). The second pass takes each micro-batch through the backbone again, and that gradient back. A
process that holds its whole share at once keeps the first pass's graph and needs no second pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from largebatch.config.modes import Bt
from largebatch.modes import bt
from largebatch.modes.global_loss import global_loss


@dataclass
class ExactGradient:
    """One optimizer step's gradient.

    Attributes:
        model: backbone and projector; their ``.grad`` is what a step leaves.
        network: the backbone as training calls it.
        options: of the mode.
        batches: micro-batches; each comes twice, all of a step before the first repetition, unless there is only one.
        pieces: this process's micro-batches as parts of the global batch; maybe none.
        images: number of images of the global batch.
        autocast: for backbone and projector.
        seed: seeds torch for a view (0 or 1) of a micro-batch, so that dropout is the same in both passes.
        after_pass: called after the backward pass of each micro-batch.
        timed: charges what is done inside to a phase of the profile.
    """

    model: bt.BarlowTwins
    network: Callable[[Tensor], Tensor]
    options: Bt
    batches: Iterator[tuple[Tensor, Tensor]]
    pieces: Sequence[slice]
    images: int
    autocast: torch.autocast
    seed: Callable[[int, int], None]
    after_pass: Callable[[], None]
    timed: Callable[[str], AbstractContextManager[None]]

    def compute(self) -> tuple[Tensor, Tensor]:
        """Add gradients whose mean over the processes is that of the loss over the global batch.

        Returns:
            The totals of this process's images, and whether the loss is finite, both on the device.
        """
        options, own = self.options, self._parts()
        share = own[-1].stop if own else 0
        largest = max((part.stop - part.start for part in own), default=1)
        self.model.train()
        outputs, collected = [], None
        if len(own) == 1:
            images = self._images()
            with self.timed("forward"):
                outputs = [self._first_layer(view, 0, place) for place, view in enumerate(images.chunk(2))]
                collected = torch.stack([output.detach() for output in outputs])
        else:
            collected = self._collect(share)
        with self.timed("forward"):
            parts, gradient = global_loss(
                self.model.projector, collected, largest, self.autocast,
                images=self.images, lmbda=options.lmbda, scale=options.loss_scale,
            )  # fmt: skip
        if outputs:
            with self.timed("backward"):
                for output, upstream in zip(outputs, gradient, strict=True):
                    torch.autograd.backward(output, upstream)
            self.after_pass()
        else:
            self._replay(gradient)
        return bt.counted(options.loss_scale, parts, share), parts[0].isfinite()

    @torch.no_grad()
    def _collect(self, share: int) -> Tensor:
        """Return outputs of the first layer [2, share, width]; running statistics stay as they are."""
        buffers = list(self.model.buffers())
        before = [buffer.clone() for buffer in buffers]
        collected = None
        for number, part in enumerate(self._parts()):
            images = self._images()
            with self.timed("forward"):
                for place, view in enumerate(images.chunk(2)):
                    output = self._first_layer(view, number, place)
                    if collected is None:
                        collected = output.new_empty(2, share, output.shape[1])
                    collected[place, part] = output
        for buffer, saved in zip(buffers, before, strict=True):  # the second pass moves them
            buffer.copy_(saved)
        if collected is None:  # without images
            weight = self.model.projector.first.weight
            collected = weight.new_empty(2, 0, len(weight))
        return collected

    def _replay(self, gradient: Tensor) -> None:
        for number, part in enumerate(self._parts()):
            images = self._images()
            for place, view in enumerate(images.chunk(2)):
                with self.timed("forward"):
                    output = self._first_layer(view, number, place)
                with self.timed("backward"):
                    torch.autograd.backward(output, gradient[place, part])
            self.after_pass()

    def _images(self) -> Tensor:
        with self.timed("data"):
            images, _ = next(self.batches)
        return images

    def _first_layer(self, view: Tensor, number: int, place: int) -> Tensor:
        """Return the output of backbone and first layer of the projector."""
        self.seed(number, place)
        with self.autocast:
            output: Tensor = self.model.projector.first(self.network(view))
        return output

    def _parts(self) -> list[slice]:
        """Return the rows of each micro-batch among this process's images."""
        ends = list(itertools.accumulate(piece.stop - piece.start for piece in self.pieces))
        return [slice(start, end) for start, end in itertools.pairwise([0, *ends])]
