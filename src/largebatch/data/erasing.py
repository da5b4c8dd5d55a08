"""Random erasing, as timm's ``RandomErasing``: boxes of a batch of normalised images are filled."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from largebatch.config.augmentation import ErasingConfig
from largebatch.data.stream import to_device

_TRIES = 10  # attempts to find a box that is smaller than the image
_MURMUR = (0x85EBCA6B - (1 << 32), 0xC2B2AE35 - (1 << 32))  # multipliers of MurmurHash3's last step, as int32


@dataclass(frozen=True)
class EraseDraws:
    """Random numbers of one image in each row; ``draws[a:b]`` is a part of the batch.

    ``boxes`` is int32 [N, count, 4]: top, left, height and width in pixels; 0 pixels erase nothing. ``seeds`` is int32
    [N], the seed of the image's noise. ``fill`` is that of ``ErasingConfig``.
    """

    fill: str
    boxes: Tensor
    seeds: Tensor

    def __getitem__(self, part: slice) -> EraseDraws:
        return replace(self, boxes=self.boxes[part], seeds=self.seeds[part])

    def to(self, device: torch.device | str) -> EraseDraws:
        boxes, seeds = (to_device(table, torch.device(device)) for table in (self.boxes, self.seeds))
        return replace(self, boxes=boxes, seeds=seeds)


def draw_erasing(generator: torch.Generator, n: int, side: int, config: ErasingConfig) -> EraseDraws:
    """Return ``n`` draws for images of ``side`` pixels, on the CPU.

    An image is erased with ``config.probability``. The area of a box is uniform between ``min_area`` and ``max_area``
    of the image, divided by the number of boxes. The logarithm of height to width is uniform between ``min_aspect`` and
    its inverse. The first of ten attempts that is smaller than the image counts; without any, there is no box.
    """
    erased = (torch.rand(n, generator=generator) < config.probability).numpy()
    seeds = torch.randint(-(1 << 31), 1 << 31, (n,), generator=generator).to(torch.int32)
    boxes = np.zeros((n, config.count, 4), np.int32)
    log_aspect = math.log(config.min_aspect)
    for k in range(config.count):
        left = np.flatnonzero(erased)
        for _ in range(_TRIES):
            if not len(left):
                break
            area, aspect, down, across = torch.rand((4, len(left)), dtype=torch.float64, generator=generator).numpy()
            area = (config.min_area + (config.max_area - config.min_area) * area) * side**2 / config.count
            aspect = np.exp(log_aspect * (1 - 2 * aspect))
            sizes = np.sqrt([area * aspect, area / aspect]).round()
            fits = (sizes < side).all(0)
            corners = np.minimum((np.stack([down, across]) * (side - sizes + 1)).astype(np.int64), side - sizes)
            boxes[left[fits], k] = np.concatenate([corners, sizes]).T[fits]
            left = left[~fits]
    return EraseDraws(config.fill, torch.from_numpy(boxes), seeds)


def erased(images: Tensor, draws: EraseDraws) -> Tensor:
    """Return normalised images, float32 [N, C, S, S], with the boxes filled, in their memory format."""
    at = torch.arange(images.shape[2], dtype=torch.int32, device=images.device)
    result, fill = images.clone(), images.new_zeros(())
    if draws.fill != "zero":
        fill = _noise(images, draws.seeds, by_pixel=draws.fill == "pixel")
    for top, left, height, width in (box.view(-1, 4, 1).unbind(1) for box in draws.boxes.unbind(1)):
        rows, columns = (at >= top) & (at < top + height), (at >= left) & (at < left + width)  # [N, S]
        box = (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)
        torch.where(box, fill, result, out=result)
    return result


def _noise(images: Tensor, seeds: Tensor, by_pixel: bool) -> Tensor:
    """Return normally distributed numbers, [N, C, S, S] or [N, C, 1, 1], as a function of seed and place alone.

    The numbers are the normal distribution's 65,536 quantiles. Arithmetic in integers makes them equal on all devices.
    """
    shape = images.shape[1:] if by_pixel else (images.shape[1], 1, 1)
    place = torch.arange(math.prod(shape), dtype=torch.int32, device=images.device).view(shape)
    mixed = _scrambled(_scrambled(place) ^ seeds.view(-1, 1, 1, 1))
    chosen = (mixed & 0xFFFF).flatten()
    return _quantiles(images.device).index_select(0, chosen).view(mixed.shape)


def _scrambled(numbers: Tensor) -> Tensor:
    """Return int32 numbers that depend on all bits of ``numbers`` (the last step of MurmurHash3)."""
    numbers = (numbers ^ ((numbers >> 16) & 0xFFFF)) * _MURMUR[0]
    numbers = (numbers ^ ((numbers >> 13) & 0x7FFFF)) * _MURMUR[1]
    return numbers ^ ((numbers >> 16) & 0xFFFF)


@functools.cache
def _quantiles(device: torch.device) -> Tensor:
    """Return the middles of 65,536 equally probable parts of the normal distribution, float32."""
    middles = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    quantiles: Tensor = torch.special.ndtri(middles)
    return quantiles.float().to(device)
