"""The gradient of Barlow Twins' loss over a global batch, on devices that hold a micro-batch (``mode.exact``).

Two passes over the same micro-batches: the first one, without gradients, collects the outputs of backbone and first
layer of the projector; from those the loss over the global batch follows, and its gradient with respect to them
(``modes/global_loss.py``); the second one takes each micro-batch through the backbone again, and that gradient back.
A process that holds its whole share at once keeps the first pass's graph and does without the second.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from largebatch.config.batch import BatchPlan
from largebatch.config.schema import Config
from largebatch.modes import bt
from largebatch.modes.global_loss import global_loss
from largebatch.seeding import derive_seed
from largebatch.training.profile import Profile
from largebatch.training.state import Run, Training

Batches = Iterator[tuple[Tensor, Tensor]]


def global_gradient(run: Run, training: Training, batches: Batches, profile: Profile) -> Tensor:
    """Gradients whose mean over the processes is that of the loss over the global batch; adds to the totals.

    Args:
        batches: each micro-batch of the step comes twice, one after the other, unless there is only one.

    Returns:
        Whether the loss was finite.
    """
    mode, model, batch = run.config.mode, training.model, run.batch
    assert isinstance(model, bt.BarlowTwins)
    assert mode.lmbda is not None
    assert mode.loss_scale is not None
    model.train()
    outputs, collected = [], None
    if batch.accumulation == 1:
        with profile.phase("data"):
            images, _ = next(batches)
        with profile.phase("forward"):
            outputs = [_first_layer(run, training, view, 0, place) for place, view in enumerate(images.chunk(2))]
            collected = torch.stack([output.detach() for output in outputs])
    else:
        collected = _collect(run, training, batches, profile)
    with profile.phase("forward"):
        parts, gradient = global_loss(
            model.projector, collected, batch.micro_batch, run.autocast, lmbda=mode.lmbda, scale=mode.loss_scale
        )
    if outputs:
        with profile.phase("backward"):
            for output, upstream in zip(outputs, gradient, strict=True):
                torch.autograd.backward(output, upstream)
    else:
        _replay(run, training, batches, gradient, profile)
    training.totals += bt.counted(mode.loss_scale, parts, batch.per_process)
    return parts[0].isfinite()


@torch.no_grad()
def _collect(run: Run, training: Training, batches: Batches, profile: Profile) -> Tensor:
    """Outputs of the first layer [2, images of this process, width]; running statistics stay as they are."""
    buffers = list(training.model.buffers())
    before = [buffer.clone() for buffer in buffers]
    collected = None
    for number, part in enumerate(_parts(run)):
        with profile.phase("data"):
            images, _ = next(batches)
        with profile.phase("forward"):
            for place, view in enumerate(images.chunk(2)):
                output = _first_layer(run, training, view, number, place)
                if collected is None:
                    collected = output.new_empty(2, run.batch.per_process, output.shape[1])
                collected[place, part] = output
    for buffer, saved in zip(buffers, before, strict=True):  # the second pass moves them
        buffer.copy_(saved)
    assert collected is not None
    return collected


def _replay(run: Run, training: Training, batches: Batches, gradient: Tensor, profile: Profile) -> None:
    for number, part in enumerate(_parts(run)):
        with profile.phase("data"):
            images, _ = next(batches)
        for place, view in enumerate(images.chunk(2)):
            with profile.phase("forward"):
                output = _first_layer(run, training, view, number, place)
            with profile.phase("backward"):
                torch.autograd.backward(output, gradient[place, part])


def _first_layer(run: Run, training: Training, view: Tensor, number: int, place: int) -> Tensor:
    """Backbone and first layer of the projector; what is random in them (dropout) is the same in both passes."""
    assert isinstance(training.model, bt.BarlowTwins)
    torch.manual_seed(derive_seed(run.config.seed, "view", training.step, run.rank, number, place))
    with run.autocast:
        output: Tensor = training.model.projector.first(training.network(view))
    return output


def kept_bytes(config: Config, batch: BatchPlan) -> int:
    """What a process keeps of its images between the passes: each layer's output of the projector, and one gradient."""
    widths = config.mode.projector or []
    return 4 * 2 * batch.per_process * (sum(widths) + max(widths))


def _parts(run: Run) -> list[slice]:
    """The rows of each micro-batch among this process's images."""
    size = run.batch.micro_batch
    return [slice(row, row + size) for row in range(0, run.batch.per_process, size)]
