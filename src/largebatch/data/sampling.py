"""Choice of the images of each optimizer step, each process and a held-out part: pure functions of the seed.

The choice doesn't depend on the number of processes or on accumulation, and a resume needs no stored state.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from largebatch.config.epochs import Epochs
from largebatch.errors import UserError
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

    A class of n_c images gives ``n_c * count / N``, rounded down. The classes with the largest remainders give one more
    image each, until there are ``count`` (if remainders are equal, the first class). ``seed`` chooses the images of a
    class.

    Raises:
        UserError: if a class would have no image on one side.
    """
    sizes = torch.bincount(labels)
    wanted = sizes * count  # in 1/N of an image: exact
    held = wanted // len(labels)
    remainders = wanted - held * len(labels)
    rounded_up = torch.sort(remainders, descending=True, stable=True).indices[: count - int(held.sum())]
    held[rounded_up] += 1
    for label, (size, part) in enumerate(zip(sizes.tolist(), held.tolist(), strict=True)):
        if size and part in (0, size):
            nothing = "the training set" if part else "the held-out part"
            raise UserError(
                f"holding out {count} of {len(labels)} images leaves no image of class {label}, which has {size}, in "
                f"{nothing}"
            )

    generator = torch.Generator().manual_seed(seed)
    is_held = torch.zeros(len(labels), dtype=torch.bool)
    for label, part in enumerate(held.tolist()):
        members = torch.nonzero(labels == label).flatten()
        is_held[members[torch.randperm(len(members), generator=generator)[:part]]] = True
    return torch.nonzero(~is_held).flatten(), torch.nonzero(is_held).flatten()
