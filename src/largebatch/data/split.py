"""Images with their labels, and how a part of them is held out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from largebatch.data.images import Images
from largebatch.errors import UserError


@dataclass(frozen=True)
class Split:
    """``images`` in memory or in files; ``labels`` int64 [N], in the order of the images."""

    images: Images
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Tensor) -> Split:
        return Split(self.images.select(indices), self.labels[indices])


def hold_out(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (kept, held out) of a stratified choice of exactly ``count`` of ``labels`` [N], each in ascending order.

    A class of n_c images gives ``n_c * count / N``, rounded down; the images that are still missing come one each from
    the classes with the largest remainders (the first class, where remainders are equal). Which images of a class they
    are follows from ``seed``.

    Raises:
        UserError: when a class would be left with nothing on either side.
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
                f"holding out {count} of {len(labels)} images leaves class {label}, which has {size}, with nothing in "
                f"{nothing}"
            )

    generator = torch.Generator().manual_seed(seed)
    is_held = torch.zeros(len(labels), dtype=torch.bool)
    for label, part in enumerate(held.tolist()):
        members = torch.nonzero(labels == label).flatten()
        is_held[members[torch.randperm(len(members), generator=generator)[:part]]] = True
    return torch.nonzero(~is_held).flatten(), torch.nonzero(is_held).flatten()
