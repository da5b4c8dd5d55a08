"""Random images and labels of a given shape, for timing."""

from __future__ import annotations

import torch

from largebatch.config.datasets import DatasetConfig
from largebatch.data.cache import Say
from largebatch.data.images import MemoryImages, Split
from largebatch.errors import UserError

_SEED = 0


def load_synthetic(config: DatasetConfig, say: Say) -> tuple[Split, Split, tuple[str, ...]]:
    """Return uniformly random bytes with balanced labels in random order, equal for every run.

    Raises:
        UserError: if a size isn't set.
    """
    train_size, test_size = _given(config, "train_size"), _given(config, "test_size")
    num_classes, side = _given(config, "num_classes"), _given(config, "image_size")
    generator = torch.Generator().manual_seed(_SEED)

    def random_split(n: int) -> Split:
        pixels = torch.randint(0, 256, (n, config.channels, side, side), dtype=torch.uint8, generator=generator)
        return Split(MemoryImages(pixels), torch.randperm(n, generator=generator) % num_classes)

    return random_split(train_size), random_split(test_size), tuple(str(label) for label in range(num_classes))


def _given(config: DatasetConfig, key: str) -> int:
    value: int | None = getattr(config, key)
    if value is None:
        raise UserError(f"dataset.{key}=null: dataset=synthetic needs a number")
    return value
