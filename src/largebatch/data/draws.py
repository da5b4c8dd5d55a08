"""Random numbers of the augmentation for classification: crop, flip and rotation of each image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from largebatch.data.transfer import to_device

_FIXED_POINT = 1 << 16  # PIL's affine transform counts in 1/65536 of a pixel
_LARGEST_SIDE = 1 << 14  # pixels


@dataclass(frozen=True)
class Draws:
    """Random numbers of one image in each row of ``table``; ``draws[a:b]`` is a part of the batch.

    ``table`` is int32 [N, 8]: ``top`` and ``left``, the crop's corner in the padded image, 0 to ``2 * padding``;
    ``flip``, 0 or 1; and the rotation in 1/65536: ``cos``, ``sin``, ``-sin`` of the angle, and the row and the column
    in the crop of the source of the pixel in row 0, column 0. ``padding`` is the border in pixels.
    """

    padding: int
    table: Tensor

    def __getitem__(self, part: slice) -> Draws:
        return Draws(self.padding, self.table[part])

    def to(self, device: torch.device | str) -> Draws:
        return Draws(self.padding, to_device(self.table, torch.device(device)))


def draw(generator: torch.Generator, n: int, *, padding: int, flip: bool, rotation: float, side: int) -> Draws:
    """Return ``n`` draws for images of ``side`` pixels, on the CPU.

    Corners are uniform in 0..2*padding, a flip has probability 0.5, angles are uniform in +-``rotation`` degrees.

    Raises:
        ValueError: for images of more than 16384 pixels a side, in which a position may overflow int32.
    """
    if side > _LARGEST_SIDE:
        raise ValueError(f"{side=} is more than {_LARGEST_SIDE}")
    corners = torch.randint(0, 2 * padding + 1, (2, n), generator=generator)
    flipped = torch.rand(n, generator=generator) < 0.5 if flip else torch.zeros(n, dtype=torch.bool)
    angle = (2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1) * rotation
    table = torch.stack([*corners, flipped, *_rotation(angle, side)])
    return Draws(padding, table.t().to(torch.int32, memory_format=torch.contiguous_format))


def _rotation(angle: Tensor, side: int) -> Tensor:
    """Return the last five columns of ``Draws.table`` as [5, N]; ``angle``: float64 [N], degrees counter-clockwise."""
    radians = angle * (-math.pi / 180)
    cos, sin = radians.cos(), radians.sin()
    # The middle of the pixel in row 0, column 0 is at (0.5, 0.5).
    centre = side / 2
    first_row = centre + (cos - sin) * (0.5 - centre)
    first_column = centre + (cos + sin) * (0.5 - centre)
    return torch.stack([cos, sin, -sin, first_row, first_column]).mul_(_FIXED_POINT).add_(0.5).floor_()
