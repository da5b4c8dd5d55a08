"""Choice of the images of each optimizer step and process: pure functions of the seed and the step.

The choice doesn't depend on the number of processes or on accumulation, and a resume needs no stored state.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from largebatch.errors import UserError
from largebatch.seeding import derive_seed


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Return ``n // batch_size``: the incomplete last batch is dropped.

    Raises:
        UserError: if there are fewer than ``batch_size`` images.
    """
    if batch_size > n:
        raise UserError(f"batch_size={batch_size}: larger than the training set of {n} images, so at most {n}")
    return n // batch_size


def global_batches(n: int, batch_size: int, seed: int, start_step: int) -> Iterator[tuple[int, Tensor]]:
    """Yield endless ``(step, indices [batch_size])``; every epoch has another order of the images."""
    steps = steps_per_epoch(n, batch_size)
    epoch, position = divmod(start_step, steps)
    while True:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(derive_seed(seed, "shuffle", epoch)))
        for i in range(position, steps):
            yield epoch * steps + i, order[i * batch_size : (i + 1) * batch_size]
        epoch, position = epoch + 1, 0


def evaluation_share(n: int, rank: int, processes: int) -> Tensor:
    """Return the indices that ``rank`` evaluates: a contiguous block; sizes differ by at most one and may be 0."""
    return torch.arange(rank * n // processes, (rank + 1) * n // processes)
