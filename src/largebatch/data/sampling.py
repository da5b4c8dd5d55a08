"""Which images each optimizer step and each process takes: pure functions of the seed and the step.

Nothing of it depends on the number of processes or on accumulation, and nothing has to be stored for a resume.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from largebatch.errors import UserError
from largebatch.seeding import derive_seed


def steps_per_epoch(n: int, batch_size: int) -> int:
    """``n // batch_size``: the incomplete last batch is dropped.

    Raises:
        UserError: when there aren't ``batch_size`` images.
    """
    if batch_size > n:
        raise UserError(f"batch_size={batch_size}: larger than the training set of {n} images, so at most {n}")
    return n // batch_size


def global_batches(n: int, batch_size: int, seed: int, start_step: int) -> Iterator[tuple[int, Tensor]]:
    """Endless ``(step, indices [batch_size])``, the images being shuffled anew every epoch."""
    steps = steps_per_epoch(n, batch_size)
    epoch, position = divmod(start_step, steps)
    while True:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(derive_seed(seed, "shuffle", epoch)))
        for i in range(position, steps):
            yield epoch * steps + i, order[i * batch_size : (i + 1) * batch_size]
        epoch, position = epoch + 1, 0


def evaluation_share(n: int, rank: int, processes: int) -> Tensor:
    """The indices that ``rank`` evaluates: a contiguous block; sizes differ by at most one and may be 0."""
    return torch.arange(rank * n // processes, (rank + 1) * n // processes)
