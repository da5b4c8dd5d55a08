"""One optimizer step: forward and backward over the micro-batches, the update, and a step that ran out of memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from largebatch.machine import distributed
from largebatch.machine.memory import is_out_of_memory
from largebatch.optim import CLARS
from largebatch.optim.layerwise import LayerwiseOptimizer
from largebatch.tracking.layers import plain_statistics
from largebatch.tracking.recorder import Recorder
from largebatch.training.exact import global_gradient
from largebatch.training.micro_batch import release_memory, smaller_micro_batch
from largebatch.training.profile import Profile
from largebatch.training.state import Run, Training

Batches = Iterator[tuple[Tensor, Tensor]]


def gradient(run: Run, training: Training, batches: Batches, profile: Profile) -> tuple[Tensor | None, Run]:
    """Gradient of the mean loss over a global batch; adds to the totals what the mode counts.

    Returns:
        Whether every loss was finite, as a tensor on the device (reading it here would wait for the device), and
        ``run``. With ``micro_batch=auto`` it is None where memory ran out in any process: nothing has happened then,
        and the step is to be taken again as the run that is returned, which has smaller micro-batches.
    """
    forward_backward = global_gradient if run.exact else _forward_backward
    if not run.within_memory:
        losses_finite = forward_backward(run, training, batches, profile)
        if run.averages_afterwards:
            distributed.average_gradients(training.model)
        return losses_finite, run
    buffers = list(training.model.buffers())
    before = [tensor.clone() for tensor in (training.totals, *buffers)]
    finite = None
    try:
        finite = forward_backward(run, training, batches, profile)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if not distributed.any_process(finite is None):
        # Not along the backward pass, as DDP does: the others would wait there for one that ran out of memory.
        distributed.average_gradients(training.model)
        return finite, run
    training.optimizer.zero_grad(set_to_none=True)
    if training.norms is not None:
        training.norms.forget()
    for tensor, saved in zip((training.totals, *buffers), before, strict=True):
        tensor.copy_(saved)
    release_memory(run.device)
    return None, run.with_micro_batch(smaller_micro_batch(run.batch, run.sample_size))


def _forward_backward(run: Run, training: Training, batches: Batches, profile: Profile) -> Tensor:
    """Gradient over this process's share of the batch, averaged with the others'. Returns whether losses are finite."""
    training.replica.train()
    finite = torch.ones((), dtype=torch.bool, device=run.device)
    accumulation = run.batch.accumulation
    for part in range(accumulation):
        with profile.phase("data"):
            images, labels = next(batches)
        with _without_sync(training, more_to_come=part + 1 < accumulation):
            with profile.phase("forward"), run.autocast:
                loss, counted = run.mode.loss(run.config, training.network, images, labels)
            with profile.phase("backward"):
                (loss / accumulation).backward()
        training.totals += counted
        finite &= loss.detach().isfinite()
    return finite


def _without_sync(training: Training, more_to_come: bool) -> contextlib.AbstractContextManager[None]:
    """Gradients are averaged over processes in the last micro-batch of a step only."""
    if more_to_come and isinstance(training.replica, DistributedDataParallel):
        return training.replica.no_sync()
    return contextlib.nullcontext()


def update(training: Training, recorder: Recorder | None, every: int, profile: Profile) -> None:
    """One optimizer and schedule step; every so many steps the layers' statistics are recorded."""
    optimizer = training.optimizer
    due = recorder is not None and every > 0 and training.step % every == 0
    layerwise = isinstance(optimizer, LayerwiseOptimizer)
    plain = plain_statistics(training.model) if due and not layerwise else None
    with profile.phase("optimizer"):
        if training.norms is not None and isinstance(optimizer, CLARS):
            optimizer.set_sample_norms(training.norms.means())
        optimizer.step()
    with profile.phase("logging"):
        if recorder and plain:
            recorder.layers(training.step, *plain)
        elif recorder and due and isinstance(optimizer, LayerwiseOptimizer):
            recorder.layers(training.step, optimizer.layer_names, optimizer.layer_stats())
    optimizer.zero_grad(set_to_none=True)
    training.schedule.step()
