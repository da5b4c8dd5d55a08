"""``micro_batch=auto``: find the largest micro-batch that fits into memory, and a smaller one when memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn

from largebatch.config.batch import BatchPlan
from largebatch.errors import UserError
from largebatch.machine import distributed
from largebatch.machine.memory import free_memory, is_out_of_memory
from largebatch.machine.precision import Arithmetic, Image, trial_images, trial_pass

_PART_TO_USE = 0.8  # of the host's free memory; the rest is for other processes and uncounted memory
_GRADIENTS = 2.0  # peak of a backward pass per saved byte of the forward pass: the byte and its gradient


def smaller_micro_batch(batch: BatchPlan) -> int:
    """Return half the micro-batch, or the next smaller size that divides a process's share.

    Raises:
        UserError: if there is no smaller size.
    """
    smaller = _sizes(batch, batch.micro_batch // 2)
    if not smaller:
        raise UserError(
            f"micro_batch=auto: out of memory with micro-batches of {batch.micro_batch} image(s), the smallest size. "
            "Fix: use a smaller model, or a device with more memory"
        )
    return smaller[0]


def _sizes(batch: BatchPlan, most: int) -> list[int]:
    """Return the possible micro-batches of at most ``most`` images, largest first."""
    return [n for n in range(most, 0, -1) if batch.per_process % n == 0 and n % batch.together == 0]


def too_large_for_memory(batch_norm_size: int, device: torch.device | str) -> str:
    """Return the message for a network with batch norm, whose micro-batch must keep its size."""
    return (
        f"batch_norm_size={batch_norm_size}: micro-batches of this size don't fit into the memory of {device}. "
        "Fix: a smaller batch_norm_size (another run), sync_bn=true on more processes, or a network without batch norm"
    )


def release_memory(device: torch.device) -> None:
    """Free the memory of a failed pass, so that a smaller pass finds contiguous memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def largest_micro_batch(
    model: nn.Module,
    batch: BatchPlan,
    batch_norm_size: int | None,
    image: Image,
    views: int,
    arithmetic: Arithmetic,
    device: torch.device,
    kept_bytes: int,
) -> int:
    """Return the largest divisor of this process's share that fits into memory, a multiple of ``batch.together``.

    On a GPU, try a forward and backward pass of each size, largest first, next to an allocation as large as gradients
    and optimizer states. On the host, where allocations don't fail in time, compute the size: bytes per image that a
    forward pass saves for its backward pass, against the free memory.

    Args:
        batch: the division of the global batch over processes.
        batch_norm_size: the only size, in images of all processes with ``sync_bn``; None without batch norm.
        image: shape of an image.
        views: views of an image per pass.
        kept_bytes: bytes that the mode keeps for all images of a process.

    Raises:
        UserError: if the smallest size doesn't fit, or with batch norm the only size.
    """
    # Of gradients, of two optimizer states per parameter, and of the mode.
    other_bytes = 3 * sum(p.numel() * p.element_size() for p in model.parameters()) + kept_bytes

    def trial(n: int) -> None:
        images = trial_images(image, n * views, arithmetic.memory_format, device)
        trial_pass(model, model, images, arithmetic.autocast(device))

    def fits(n: int) -> bool:
        enough = True
        try:
            beside = torch.empty(other_bytes, dtype=torch.uint8, device=device)
            trial(n)
            del beside
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            enough = False
        release_memory(device)
        return enough

    sizes = [batch.micro_batch] if batch_norm_size else _sizes(batch, batch.per_process)
    if device.type == "cuda":
        largest = next(filter(fits, sizes), None)
    else:
        room = _PART_TO_USE * free_memory(device) / distributed.processes_here() - other_bytes
        per_image = max((_saved_bytes(model, trial, 4) - _saved_bytes(model, trial, 2)) / 2, 1.0)
        largest = next((n for n in sizes if n * _GRADIENTS * per_image <= room), None)
    if largest is None and batch_norm_size:
        raise UserError(too_large_for_memory(batch_norm_size, device))
    if largest is None:
        raise UserError(
            f"micro_batch=auto: {sizes[-1]} image(s), the smallest size, don't fit into the memory of {device}. "
            "Fix: use a smaller model, or a device with more memory"
        )
    return largest


def _saved_bytes(model: nn.Module, trial: Callable[[int], None], n: int) -> int:
    """Return the bytes that a forward pass of ``n`` images saves for its backward pass, without parameters."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: list[Tensor] = []  # alive until counted, so that no address is reused

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trial(n)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for pointer, size in storages.items() if pointer not in own)
