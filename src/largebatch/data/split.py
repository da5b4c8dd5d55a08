"""Images with their labels, and the choice of a held-out part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from largebatch.data.images import FileImages, Images
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


def split_of_files(files: list[tuple[str, int]], channels: int, image_size: int) -> Split:
    """Return a split of image files from their paths and labels."""
    images = FileImages(tuple(path for path, _ in files), channels, image_size)
    return Split(images, torch.tensor([label for _, label in files]))


def hold_out(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out exactly ``count`` of ``labels`` [N], stratified; return indices (kept, held out), each ascending.

    A class of n_c images gives ``n_c * count / N``, rounded down. The classes with the largest remainders give one more
    image each, until there are ``count`` (of equal remainders the first class). ``seed`` determines the images of a
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
                f"holding out {count} of {len(labels)} images leaves class {label}, which has {size}, with nothing in "
                f"{nothing}"
            )

    generator = torch.Generator().manual_seed(seed)
    is_held = torch.zeros(len(labels), dtype=torch.bool)
    for label, part in enumerate(held.tolist()):
        members = torch.nonzero(labels == label).flatten()
        is_held[members[torch.randperm(len(members), generator=generator)[:part]]] = True
    return torch.nonzero(~is_held).flatten(), torch.nonzero(is_held).flatten()
