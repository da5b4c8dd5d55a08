"""Crop, flip, rotation and normalisation of a batch in one pass, with one draw an image.

The pixels are those of torchvision's PIL chain ``RandomCrop(S, padding) -> RandomHorizontalFlip -> RandomRotation`` at
equal parameters: the rotation is PIL's nearest-neighbour one in its 16-bit fixed point arithmetic. What it brings in
from outside the crop is 0, even where the padded image had a pixel there, as in the chain.

On CPU this is done in C++ (``augment_cpu.py``); elsewhere, and where there is no compiler, as one gather in torch. Both
give the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from largebatch.data import augment_cpu
from largebatch.data.transfer import to_device

_FIXED_POINT = 1 << 16  # PIL's affine transform counts in 1/65536 of a pixel
_LARGEST_SIDE = 1 << 14  # pixels; beyond it a position may overflow int32
_CPU_SLICE = 1 << 19  # pixels at once in torch; more leave the processor's cache


@dataclass(frozen=True)
class Draws:
    """One image's random numbers in each row of ``table``; ``draws[a:b]`` are those of a part of the batch.

    ``table`` is int32 [N, 8]: ``top`` and ``left``, the crop's corner in the padded image, 0 to ``2 * padding``;
    ``flip``, 0 or 1; and the rotation in 1/65536: ``cos``, ``sin``, ``-sin`` of the angle, and the row and the column
    in the crop that the pixel in row 0, column 0 comes from. ``padding`` is the border in pixels.
    """

    padding: int
    table: Tensor

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, part: slice) -> Draws:
        return Draws(self.padding, self.table[part])

    def to(self, device: torch.device | str) -> Draws:
        """The same on ``device``, in one transfer; to a GPU without waiting for it."""
        return Draws(self.padding, to_device(self.table, torch.device(device)))


def draw(generator: torch.Generator, n: int, *, padding: int, flip: bool, rotation: float, side: int) -> Draws:
    """``n`` draws for images of ``side`` pixels, on the CPU.

    Corners are uniform in 0..2*padding, a flip has probability 0.5, angles are uniform in +-``rotation`` degrees.
    Raises ValueError for images of more than 16384 pixels a side.
    """
    if side > _LARGEST_SIDE:
        raise ValueError(f"{side=} is more than {_LARGEST_SIDE}")
    corners = torch.randint(0, 2 * padding + 1, (2, n), generator=generator)
    flipped = torch.rand(n, generator=generator) < 0.5 if flip else torch.zeros(n, dtype=torch.bool)
    angle = (2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1) * rotation
    table = torch.stack([*corners, flipped, *_rotation(angle, side)])
    return Draws(padding, table.t().to(torch.int32, memory_format=torch.contiguous_format))


def _rotation(angle: Tensor, side: int) -> Tensor:
    """The last five columns of ``Draws.table``, as [5, N], for ``angle`` float64 [N], degrees counter-clockwise."""
    radians = angle * (-math.pi / 180)
    cos, sin = radians.cos(), radians.sin()
    # The middle of the pixel in row 0, column 0 is at (0.5, 0.5).
    centre = side / 2
    first_row = centre + (cos - sin) * (0.5 - centre)
    first_column = centre + (cos + sin) * (0.5 - centre)
    return torch.stack([cos, sin, -sin, first_row, first_column]).mul_(_FIXED_POINT).add_(0.5).floor_()


def augmented(
    pixels: Tensor,
    indices: Tensor | None,
    draws: Draws | None,
    mean: Tensor,
    std: Tensor,
    *,
    channels_last: bool = False,
) -> Tensor:
    """Images out of ``pixels``, augmented and normalised: ``(image / 255 - mean) / std``. All on one device.

    Nothing is copied to the device here, and nothing waits for it.

    Args:
        pixels: uint8 [M, C, S, S], each image contiguous; a whole data set, of which only the images at ``indices`` are
            read.
        indices: int64 [n], which images; None for all of them, in order.
        draws: of length n, made for images of S pixels; None only normalises.
        mean, std: float32 [C], for pixels in 0..1.
        channels_last: the memory format of the result.

    Returns:
        float32 [n, C, S, S].
    """
    in_cpp = pixels.device.type == "cpu" and not augment_cpu.why_not()
    way = augment_cpu.augmented if in_cpp else augmented_torch
    return way(pixels, indices, draws, mean, std, channels_last=channels_last)


def augmented_torch(
    pixels: Tensor,
    indices: Tensor | None,
    draws: Draws | None,
    mean: Tensor,
    std: Tensor,
    *,
    channels_last: bool = False,
) -> Tensor:
    """``augmented`` in torch, on any device; for ``torch.compile`` too."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    n = len(pixels) if indices is None else len(indices)
    at_once = max(_CPU_SLICE // pixels.shape[2] ** 2, 1)
    if pixels.device.type != "cpu" or n <= at_once or torch.compiler.is_compiling():
        return _augmented_part(pixels, indices, draws, mean, std, memory_format)

    result = torch.empty((n, *pixels.shape[1:]), memory_format=memory_format)
    for first in range(0, n, at_once):
        part = slice(first, first + at_once)
        images, which = (pixels[part], None) if indices is None else (pixels, indices[part])
        of_part = None if draws is None else draws[part]
        result[part] = _augmented_part(images, which, of_part, mean, std, memory_format)
    return result


def _augmented_part(
    pixels: Tensor,
    indices: Tensor | None,
    draws: Draws | None,
    mean: Tensor,
    std: Tensor,
    memory_format: torch.memory_format,
) -> Tensor:
    images = pixels if indices is None else pixels[indices]
    if draws is not None:
        position, inside = _sources(draws, pixels.shape[2])
        index = position.long().unsqueeze(1).expand(images.shape)
        images = images.flatten(2).gather(2, index.flatten(2)).view_as(images).mul_(inside.unsqueeze(1))
    images = images.contiguous(memory_format=memory_format)
    return (images - (mean * 255).view(-1, 1, 1)).div_((std * 255).view(-1, 1, 1))  # in float32


def _sources(draws: Draws, side: int) -> tuple[Tensor, Tensor]:
    """The pixel that each pixel comes from, int32 [N, S, S] in 0..S*S-1, and whether there is one, bool [N, S, S]."""
    top, left, flip, cos, sin, minus_sin, first_row, first_column = draws.table[:, :, None, None].unbind(1)
    across = torch.arange(side, dtype=torch.int32, device=draws.table.device)
    down = across[:, None]
    column = ((first_column + sin * down) + cos * across).bitwise_right_shift_(16)
    row = ((first_row + cos * down) + minus_sin * across).bitwise_right_shift_(16)

    # The crop's row 0 is the image's row `top - padding`; flipped, its column 0 is the image's column `left - padding`
    # plus S - 1. Rows and columns are used that lie both in the crop and in the image.
    top, left = top - draws.padding, left - draws.padding
    before = torch.where(flip.bool(), left, -left)  # columns of the crop before the image begins
    inside = (row >= (-top).clamp(min=0)).logical_and_(row < (side - top).clamp(max=side))
    inside.logical_and_(column >= before.clamp(min=0)).logical_and_(column < (side + before).clamp(max=side))
    step = 1 - 2 * flip
    origin = top * side + left + flip * (side - 1)
    position = row.mul_(side).add_(column.mul_(step)).add_(origin).mul_(inside)
    return position, inside
