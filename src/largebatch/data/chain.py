"""The augmentation of training images: a crop in one call, and optional steps after it (``docs/augmentation.md``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from largebatch.config.datasets import DatasetConfig
from largebatch.data.augment import augmented
from largebatch.data.draws import AnyDraws, ViewDraws, draw, draw_jitter, draw_resized_crop
from largebatch.data.erasing import EraseDraws, draw_erasing, erased
from largebatch.data.rand_augment import OpDraws, draw_operations, operated


@dataclass(frozen=True)
class Chain:
    """Draws of ``n`` images for the steps in their order; ``chain[a:b]`` is a part of the batch.

    ``crop`` is crop, flip and rotation; a resized crop has the colour jitter too. A step that is None is off.
    """

    crop: AnyDraws
    jitter: ViewDraws | None = None
    operations: OpDraws | None = None
    erasing: EraseDraws | None = None

    def __getitem__(self, part: slice) -> Chain:
        return Chain(
            None if self.crop is None else self.crop[part],
            None if self.jitter is None else self.jitter[part],
            None if self.operations is None else self.operations[part],
            None if self.erasing is None else self.erasing[part],
        )

    def to(self, device: torch.device | str) -> Chain:
        return Chain(
            None if self.crop is None else self.crop.to(device),
            None if self.jitter is None else self.jitter.to(device),
            None if self.operations is None else self.operations.to(device),
            None if self.erasing is None else self.erasing.to(device),
        )


def draw_chain(generator: torch.Generator, n: int, side: int, config: DatasetConfig) -> Chain:
    """Return the configured draws of ``n`` images of ``side`` pixels, on the CPU.

    Crops from files have been taken before, by ``file_crops.py``.
    """
    result_side = config.side_of_crop(side)
    crop: AnyDraws = None
    if config.resized_crop.is_on and config.resized_crop.source == "square":
        crop = draw_resized_crop(generator, n, side, config)
    elif config.crop_padding or config.flip or config.rotation:
        crop = draw(
            generator, n,
            padding=config.crop_padding, flip=config.flip, rotation=config.rotation, side=result_side,
        )  # fmt: skip
    jitter, operations = None, None
    if config.color_jitter.is_on and not isinstance(crop, ViewDraws):
        jitter = draw_jitter(generator, n, result_side, config.color_jitter)
    if config.rand_augment.is_on:
        operations = draw_operations(generator, n, config.rand_augment)
    erasing = draw_erasing(generator, n, result_side, config.erasing) if config.erasing.is_on else None
    return Chain(crop, jitter, operations, erasing)


def chained(
    pixels: Tensor, indices: Tensor | None, draws: Chain, mean: Tensor, std: Tensor, *, channels_last: bool
) -> Tensor:
    """Do the same as ``augmented``, with the steps of ``draws``."""
    crop = draws.crop
    if draws.jitter is not None:
        pixels, indices, crop = _bytes(pixels, indices, crop), None, draws.jitter
    if draws.operations is not None:
        pixels, indices, crop = operated(_bytes(pixels, indices, crop), draws.operations), None, None
    images = augmented(pixels, indices, crop, mean, std, channels_last=channels_last)
    return images if draws.erasing is None else erased(images, draws.erasing)


def _bytes(pixels: Tensor, indices: Tensor | None, draws: AnyDraws) -> Tensor:
    """Return the augmented pixels as uint8 [N, C, S, S], a tensor of their own."""
    channels = pixels.shape[1]
    levels = pixels.new_zeros(channels, dtype=torch.float32), pixels.new_full((channels,), 1 / 255, dtype=torch.float32)
    return augmented(pixels, indices, draws, *levels).round_().to(torch.uint8)
