"""``micro_batch=auto``: the largest micro-batch that fits into memory, and a smaller one if it doesn't after all."""

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

_PART_TO_USE = 0.8  # of the host's free memory; leave room for other processes and uncounted memory
_GRADIENTS = 2.0  # peak of a backward pass over what its forward pass saved: that, and the gradients on their way


def smaller_micro_batch(batch: BatchPlan, together: int) -> int:
    """Return half the size, or the next smaller that divides a process's share.

    Raises:
        UserError: if there is none.
    """
    smaller = _sizes(batch, together, batch.micro_batch // 2)
    if not smaller:
        raise UserError(
            f"out of memory with micro-batches of {batch.micro_batch} image(s), and there are no smaller ones; "
            "use a smaller model, or a device with more memory"
        )
    return smaller[0]


def _sizes(batch: BatchPlan, together: int, most: int) -> list[int]:
    """Return possible micro-batches of at most ``most`` images, largest first."""
    return [n for n in range(most, 0, -1) if batch.per_process % n == 0 and n % together == 0]


def release_memory(device: torch.device) -> None:
    """Give back what a failed pass left, so that a smaller one finds room in one piece."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class MicroBatchSearch:
    """Search for the largest micro-batch of a model.

    Attributes:
        batch: the division of the global batch over processes.
        together: samples that one micro-batch must hold together.
        image: shape of an image.
        views: views of an image that pass at once.
        kept_bytes: bytes that the mode keeps of all images of a process.
    """

    model: nn.Module
    batch: BatchPlan
    together: int
    image: Image
    views: int
    arithmetic: Arithmetic
    device: torch.device
    kept_bytes: int

    def largest(self) -> int:
        """Return the largest divisor of this process's share that fits, and that ``together`` divides.

        On a GPU a forward and backward pass of each size is tried, largest first, beside as much memory as gradients
        and optimizer will take. The host's allocator doesn't tell when memory is short, so there it is computed: the
        bytes that a pass keeps for its backward, by image, against the free memory.

        Raises:
            UserError: if not even the smallest fits.
        """
        sizes = _sizes(self.batch, self.together, self.batch.per_process)
        fits = self._fits if self.device.type == "cuda" else self._host_fits()
        largest = next(filter(fits, sizes), None)
        if largest is None:
            raise UserError(
                f"micro_batch=auto: not even {sizes[-1]} image(s) at once fit into the memory of {self.device}; "
                "use a smaller model, or a device with more memory"
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
        """Return the bytes that a forward pass saves for its backward, by image; parameters aside."""
        few, more = (self._saved_by(n) for n in (2, 4))
        return max((more - few) / 2, 1.0)

    def _saved_by(self, n: int) -> int:
        own = {tensor.untyped_storage().data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())}
        kept: list[Tensor] = []  # alive until counted, so that no storage is counted under another's address

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        images = self._images(n)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self._pass(images)
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
        return sum(size for pointer, size in storages.items() if pointer not in own)

    def _other_bytes(self) -> int:
        """Return the bytes of gradients, an optimizer with two states a parameter, and what the mode keeps."""
        return 3 * sum(p.numel() * p.element_size() for p in self.model.parameters()) + self.kept_bytes
