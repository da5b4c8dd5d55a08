"""``micro_batch=auto``: find the largest micro-batch that fits into memory, and a smaller one when memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from largebatch.config.batch import BatchPlan
from largebatch.errors import UserError
from largebatch.machine import distributed
from largebatch.machine.memory import free_memory, is_out_of_memory
from largebatch.machine.precision import Arithmetic
from largebatch.machine.trial import Image, trial_images, trial_pass

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


@dataclass(frozen=True)
class MicroBatchSearch:
    """Search for the largest micro-batch of a model.

    Attributes:
        batch: the division of the global batch over processes.
        batch_norm_size: the only size, in images of all processes with ``sync_bn``; None without batch norm.
        image: shape of an image.
        views: views of an image per pass.
        kept_bytes: bytes that the mode keeps for all images of a process.
    """

    model: nn.Module
    batch: BatchPlan
    batch_norm_size: int | None
    image: Image
    views: int
    arithmetic: Arithmetic
    device: torch.device
    kept_bytes: int

    def largest(self) -> int:
        """Return the largest divisor of this process's share that fits into memory, a multiple of ``batch.together``.

        On a GPU, try a forward and backward pass of each size, largest first, next to an allocation as large as
        gradients and optimizer states. On the host, where allocations don't fail in time, compute the size: bytes per
        image that a forward pass saves for its backward pass, against the free memory.

        Raises:
            UserError: if the smallest size doesn't fit, or with batch norm the only size.
        """
        sizes = [self.batch.micro_batch] if self.batch_norm_size else _sizes(self.batch, self.batch.per_process)
        fits = self._fits if self.device.type == "cuda" else self._host_fits()
        largest = next(filter(fits, sizes), None)
        if largest is None and self.batch_norm_size:
            raise UserError(too_large_for_memory(self.batch_norm_size, self.device))
        if largest is None:
            raise UserError(
                f"micro_batch=auto: {sizes[-1]} image(s), the smallest size, don't fit into the memory of "
                f"{self.device}. Fix: use a smaller model, or a device with more memory"
            )
        return largest

    def _host_fits(self) -> Callable[[int], bool]:
        room = _PART_TO_USE * free_memory(self.device) / distributed.processes_here() - self._other_bytes()
        per_image = _GRADIENTS * self._saved_bytes()
        return lambda n: n * per_image <= room

    def _fits(self, n: int) -> bool:
        fits = True
        try:
            beside = torch.empty(self._other_bytes(), dtype=torch.uint8, device=self.device)
            self._pass(self._images(n))
            del beside
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        release_memory(self.device)
        return fits

    def _pass(self, images: Tensor) -> None:
        trial_pass(self.model, self.model, images, self.arithmetic.autocast(self.device))

    def _images(self, n: int) -> Tensor:
        return trial_images(self.image, n * self.views, self.arithmetic.memory_format, self.device)

    def _saved_bytes(self) -> float:
        """Return the bytes per image that a forward pass saves for its backward pass, without parameters."""
        few, more = (self._saved_by(n) for n in (2, 4))
        return max((more - few) / 2, 1.0)

    def _saved_by(self, n: int) -> int:
        own = {tensor.untyped_storage().data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())}
        kept: list[Tensor] = []  # alive until counted, so that no address is reused

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        images = self._images(n)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self._pass(images)
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
        return sum(size for pointer, size in storages.items() if pointer not in own)

    def _other_bytes(self) -> int:
        """Return the bytes of gradients, of two optimizer states per parameter, and of the mode's ``kept_bytes``."""
        return 3 * sum(p.numel() * p.element_size() for p in self.model.parameters()) + self.kept_bytes
