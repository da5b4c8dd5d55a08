"""Choice of the images of each optimizer step, each process and a held-out part: pure functions of the seed.

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
