"""Choice of the images of each optimizer step, each process and a held-out part: pure functions of the seed.

The choice doesn't depend on the number of processes or on accumulation, and a resume needs no stored state.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from largebatch.config.datasets import held_out
from largebatch.config.epochs import Epochs
from largebatch.seeding import derive_seed


def global_batches(epochs: Epochs, seed: int, start_step: int) -> Iterator[tuple[int, Tensor]]:
    """Yield endless ``(step, indices [epochs.size(step)])``; every epoch has another order of the images."""

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(seed, "shuffle", epoch))
        return torch.randperm(epochs.images, generator=generator)

    for step in itertools.count(start_step):
        epoch, first = epochs.place(step)
        indices = order(epoch)[first : first + epochs.size(step)]
        if missing := epochs.size(step) - len(indices):
            indices = torch.cat([indices, order(epoch + 1)[:missing]])
        yield step, indices


def evaluation_share(n: int, rank: int, processes: int) -> Tensor:
    """Return the indices that ``rank`` evaluates: a contiguous block; sizes differ by at most one and may be 0."""
    return torch.arange(rank * n // processes, (rank + 1) * n // processes)


def hold_out(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out exactly ``count`` of ``labels`` [N], stratified; return indices (kept, held out), each ascending.

    ``held_out`` divides ``count`` over the classes. ``seed`` chooses the images of a class.

    Raises:
        UserError: as ``held_out``.
    """
    return hold_out_parts(labels, held_out(torch.bincount(labels).tolist(), count), seed)


def hold_out_parts(labels: Tensor, held: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Hold out ``held[label]`` images of each class, as ``hold_out`` does."""
    generator = torch.Generator().manual_seed(seed)
    is_held = torch.zeros(len(labels), dtype=torch.bool)
    for label, part in enumerate(held):
        members = torch.nonzero(labels == label).flatten()
        is_held[members[torch.randperm(len(members), generator=generator)[:part]]] = True
    return torch.nonzero(~is_held).flatten(), torch.nonzero(is_held).flatten()
