"""``micro_batch=auto``: the largest micro-batch that memory has room for, and what to do when it has not after all."""

from __future__ import annotations

import gc

import torch
from torch import Tensor, nn

from largebatch.config.batch import BatchPlan
from largebatch.errors import UserError
from largebatch.machine import distributed
from largebatch.machine.memory import free_memory, is_out_of_memory
from largebatch.machine.trial import trial_images, trial_pass
from largebatch.training.exact import kept_bytes
from largebatch.training.state import Run

_PART_TO_USE = 0.8  # of the memory that is free, on the host: others want some too, and what is counted isn't all
_GRADIENTS = 2.0  # peak of a backward pass over what its forward pass saved: that, and the gradients on their way


def largest_micro_batch(run: Run, model: nn.Module) -> int:
    """The largest divisor of this process's share that fits, and that ``optimizer.sample_size`` divides.

    On a GPU a forward and backward pass of each size is tried, largest first, beside as much memory as gradients and
    optimizer will take. The host's allocator doesn't say when memory is short, so there it is worked out: the bytes
    that a pass keeps for its backward, by image, against the free memory.

    Raises:
        UserError: when not even the smallest fits.
    """
    device = run.device
    sizes = _sizes(run.batch, run.sample_size, run.batch.per_process)
    if device.type == "cuda":
        fitting = (n for n in sizes if _fits(run, model, n))
    else:
        room = _PART_TO_USE * free_memory(device) / distributed.processes_here() - _other_bytes(run, model)
        per_image = _GRADIENTS * _saved_bytes(run, model)
        fitting = (n for n in sizes if n * per_image <= room)
    largest = next(fitting, None)
    if largest is None:
        raise UserError(
            f"micro_batch=auto: not even {sizes[-1]} image(s) at once fit into the memory of {device}; "
            "use a smaller model, or a device with more memory"
        )
    return largest


def smaller_micro_batch(batch: BatchPlan, sample_size: int) -> int:
    """Half the size, or the next smaller that divides a process's share.

    Raises:
        UserError: when there is none.
    """
    smaller = _sizes(batch, sample_size, batch.micro_batch // 2)
    if not smaller:
        raise UserError(
            f"out of memory with micro-batches of {batch.micro_batch} image(s), and there are no smaller ones; "
            "use a smaller model, or a device with more memory"
        )
    return smaller[0]


def _sizes(batch: BatchPlan, sample_size: int, most: int) -> list[int]:
    """Possible micro-batches of at most ``most`` images, largest first."""
    return [n for n in range(most, 0, -1) if batch.per_process % n == 0 and n % sample_size == 0]


def release_memory(device: torch.device) -> None:
    """Give back what a failed pass left, so that a smaller one finds room in one piece."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _fits(run: Run, model: nn.Module, n: int) -> bool:
    fits = True
    try:
        _pass_beside_the_optimizer(run, model, n)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    release_memory(run.device)
    return fits


def _pass_beside_the_optimizer(run: Run, model: nn.Module, n: int) -> None:
    beside = torch.empty(_other_bytes(run, model), dtype=torch.uint8, device=run.device)
    trial_pass(model, model, _images(run, n), run.autocast)
    del beside


def _images(run: Run, n: int) -> Tensor:
    """What ``n`` images of the data set give a model to see."""
    return trial_images(run.data.image, n * run.mode.VIEWS, run.arithmetic.memory_format, run.device)


def _saved_bytes(run: Run, model: nn.Module) -> float:
    """Bytes that a forward pass saves for its backward, by image; parameters aside."""
    few, more = (_saved_by(run, model, n) for n in (2, 4))
    return max((more - few) / 2, 1.0)


def _saved_by(run: Run, model: nn.Module, n: int) -> int:
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: list[Tensor] = []  # alive until counted, so that no storage is counted under another's address

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    images = _images(run, n)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trial_pass(model, model, images, run.autocast)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for pointer, size in storages.items() if pointer not in own)


def _other_bytes(run: Run, model: nn.Module) -> int:
    """What gradients, an optimizer with two states a parameter and an exact loss's embeddings will take."""
    parameters = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    return parameters + (kept_bytes(run.config, run.batch) if run.exact else 0)
