"""Crop, flip and rotation for a whole batch with one draw an image, as one gather.

The result is that of torchvision's PIL chain ``RandomCrop(S, padding) -> RandomHorizontalFlip -> RandomRotation`` at
equal parameters, pixel for pixel: the rotation is PIL's nearest-neighbour one in its 16-bit fixed point arithmetic.
What it brings in from outside the crop is 0, even where the padded image had a pixel there, as in the chain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

_FIXED_POINT = 1 << 16  # PIL's affine transform counts in 1/65536 of a pixel
_CPU_SLICE = 512  # images at once; more leave the processor's cache (4096 of 32x32: half the speed)


@dataclass(frozen=True)
class Draws:
    """One image's random numbers in each row; ``draws[a:b]`` are those of a part of the batch.

    Shapes [N]: ``top`` and ``left`` int64, the crop's corner in the padded image; ``flip`` bool; ``angle`` float64,
    degrees counter-clockwise. ``padding`` is the border in pixels.
    """

    padding: int
    top: Tensor
    left: Tensor
    flip: Tensor
    angle: Tensor

    def __getitem__(self, part: slice) -> Draws:
        return Draws(self.padding, self.top[part], self.left[part], self.flip[part], self.angle[part])


def draw(generator: torch.Generator, n: int, *, padding: int, flip: bool, rotation: float) -> Draws:
    """``n`` draws: corners uniform in 0..2*padding, a flip with probability 0.5, an angle uniform in +-``rotation``."""
    top, left = torch.randint(0, 2 * padding + 1, (2, n), generator=generator)
    flipped = torch.rand(n, generator=generator) < 0.5 if flip else torch.zeros(n, dtype=torch.bool)
    angle = (2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1) * rotation
    return Draws(padding, top, left, flipped, angle)


def apply(images: Tensor, draws: Draws) -> Tensor:
    """Augment uint8 ``images`` [N, C, S, S], on their device, with ``draws`` of length N; gives the same shape."""
    if images.device.type == "cpu" and len(images) > _CPU_SLICE:
        parts = [slice(first, first + _CPU_SLICE) for first in range(0, len(images), _CPU_SLICE)]
        return torch.cat([apply(images[part], draws[part]) for part in parts])
    n, channels, side, _ = images.shape
    border = max(draws.padding, 1)  # at least one, so that position 0 of the canvas is always an empty pixel
    width = side + 2 * border
    canvas = pad(images, (border,) * 4).view(n, channels, width * width)

    row, column, inside = _rotated_positions(draws.angle, side, images.device)
    step = torch.where(draws.flip, -1, 1)
    corner = draws.left + (border - draws.padding) + torch.where(draws.flip, side - 1, 0)
    origin = (draws.top + (border - draws.padding)) * width + corner
    index = row.mul_(width).add_(column.mul_(_per_image(step, images.device))).add_(_per_image(origin, images.device))
    index.mul_(inside)  # outside the crop: the empty pixel

    index = index.view(n, 1, side * side).long().expand(-1, channels, -1)
    return canvas.gather(2, index).view_as(images)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """float32 ``(images / 255 - mean) / std`` of uint8 ``images`` [N, C, H, W], by channel."""
    scaled_mean = torch.tensor(mean, device=images.device).mul_(255).view(-1, 1, 1)
    scaled_std = torch.tensor(std, device=images.device).mul_(255).view(-1, 1, 1)
    return images.float().sub_(scaled_mean).div_(scaled_std)


def _rotated_positions(angle: Tensor, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column in the crop that each rotated pixel comes from, int32 [N, S, S], and whether they lie inside."""
    radians = angle * (-math.pi / 180)
    cos, sin = radians.cos(), radians.sin()
    centre = side / 2
    # Source of the pixel in row 0, column 0, whose middle is at (0.5, 0.5).
    first_column = centre + (cos + sin) * (0.5 - centre)
    first_row = centre + (cos - sin) * (0.5 - centre)

    # int32 overflows at a side of 2 ** 15 pixels, which nobody trains on.
    fixed = [(number * _FIXED_POINT + 0.5).floor() for number in (cos, sin, -sin, first_row, first_column)]
    cos, sin, minus_sin, first_row, first_column = (_per_image(number, device) for number in fixed)
    across = torch.arange(side, dtype=torch.int32, device=device)
    down = across[:, None]
    column = (first_column + sin * down) + cos * across
    row = (first_row + cos * down) + minus_sin * across
    column >>= 16
    row >>= 16
    last = side - 1
    inside = (row.clamp(0, last) == row).logical_and_(column.clamp(0, last) == column)
    return row, column, inside


def _per_image(numbers: Tensor, device: torch.device) -> Tensor:
    """[N] as int32 [N, 1, 1] on ``device``."""
    return numbers.to(torch.int32).to(device, non_blocking=True).view(-1, 1, 1)
