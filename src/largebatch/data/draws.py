"""Random numbers of the augmentation, drawn for a whole batch at once.

``Draws`` are crop, flip and rotation of each image, for classification. ``ViewDraws`` are a random resized crop with a
flip, or a Barlow Twins view. A view's recipe is that of ``facebookresearch/barlowtwins``, in its order: resized crop
(scale 0.08..1, ratio 3/4..4/3, bicubic), flip, colour jitter (brightness 0.4, contrast 0.4, saturation 0.2, hue 0.1;
with probability 0.8, its four steps in random order), grayscale (0.2), Gaussian blur (sigma 0.1..2 pixels), solarize.
Each view has its own smallest scale and probabilities. Each number is distributed as in torchvision's transforms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from largebatch.config.augmentation import ColorJitterConfig
from largebatch.config.datasets import DatasetConfig
from largebatch.data.stream import to_device

_FIXED_POINT = 1 << 16  # PIL's affine transform counts in 1/65536 of a pixel
_LARGEST_SIDE = 1 << 14  # pixels
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 0.4, 0.4, 0.2, 0.1
_SIGMA = (0.1, 2.0)
_ORDERS = np.array(list(itertools.permutations(range(4))))  # of the colour jitter's steps
_TRIES = 10  # attempts to find a crop that fits into the image

_Numbers = NDArray[np.floating[Any]]

# Numbers of the colour jitter's steps in ViewDraws.
BRIGHTNESS, CONTRAST, SATURATION, HUE, NO_STEP = range(5)
_WHOLE = (
    *("top", "left", "height", "width", "flip", "jitter"),
    *("step0", "step1", "step2", "step3", "hue", "gray", "solarize"),
)
_REAL = ("brightness", "contrast", "saturation", "sigma")


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
    table = torch.stack([*corners, flipped, *fixed_rotation(angle, side)])
    return Draws(padding, table.t().to(torch.int32, memory_format=torch.contiguous_format))


def fixed_rotation(angle: Tensor, side: int) -> Tensor:
    """Return the last five columns of ``Draws.table`` as [5, N]; ``angle``: float64 [N], degrees counter-clockwise."""
    radians = angle * (-math.pi / 180)
    cos, sin = radians.cos(), radians.sin()
    # The middle of the pixel in row 0, column 0 is at (0.5, 0.5).
    centre = side / 2
    first_row = centre + (cos - sin) * (0.5 - centre)
    first_column = centre + (cos + sin) * (0.5 - centre)
    return torch.stack([cos, sin, -sin, first_row, first_column]).mul_(_FIXED_POINT).add_(0.5).floor_()


@dataclass(frozen=True)
class ViewDraws:
    """Random numbers of one image in each row; ``draws[a:b]`` is a part of the batch.

    ``whole`` is int32 [N, 13]: top, left, height and width of the crop in pixels; flip, 0 or 1; jitter, 0 or 1; its
    four steps in their order (0 brightness, 1 contrast, 2 saturation, 3 hue, 4 for a hue that is off); hue, the shift
    of the hue in bytes, modulo 256; gray and solarize, 0 or 1. ``real`` is float32 [N, 4]: the factors of brightness,
    contrast and saturation, and the blur's sigma in pixels, at most 2.4, or 0 for no blur. ``views_cpu.cpp`` has the
    same columns. ``side`` is that of the result in pixels, at most the images'. The crop is resized by
    ``interpolation``.
    """

    whole: Tensor
    real: Tensor
    side: int
    interpolation: str = "bicubic"

    def __getitem__(self, part: slice) -> ViewDraws:
        return replace(self, whole=self.whole[part], real=self.real[part])

    def to(self, device: torch.device | str) -> ViewDraws:
        whole, real = (to_device(table, torch.device(device)) for table in (self.whole, self.real))
        return replace(self, whole=whole, real=real)

    def columns(self) -> dict[str, Tensor]:
        """Return the columns by name, each of shape [N]."""
        whole = zip(_WHOLE, self.whole.unbind(1), strict=True)
        return {**dict(whole), **dict(zip(_REAL, self.real.unbind(1), strict=True))}


AnyDraws = Draws | ViewDraws | None  # None: no augmentation


def draw_view(generator: torch.Generator, n: int, side: int, config: DatasetConfig, view: int) -> ViewDraws:
    """Return ``n`` draws for the first (0) or second (1) ``view`` of images of ``side`` pixels, on the CPU.

    The arithmetic is NumPy's: dozens of small operations would each wake torch's threads.
    """
    views = config.views
    if config.resized_crop.source == "file":  # the images are crops already
        sizes, unfit = np.full((2, n), float(side)), np.zeros(0, np.int64)
    else:
        sizes, unfit = _crop_sizes(generator, n, side, (views.min_area, 1.0), views.RATIO)
    top, left, order, flip, jitter, gray, solarize, blur, hue, sigma, *factors = torch.rand(
        (13, n), generator=generator
    ).numpy()
    whole, real = _crop_tables(side, top, left, sizes, unfit)
    whole[:, 4], whole[:, 5] = flip < (0.5 if config.flip else 0.0), jitter < views.jitter
    whole[:, 6:10] = _ORDERS[_up_to(order, len(_ORDERS) - 1)]
    whole[:, 10] = _between(-_HUE, _HUE, hue) * 255  # rounded towards 0, as in torchvision
    whole[:, 11], whole[:, 12] = gray < views.gray, solarize < views.solarize[view]
    for column, (spread, factor) in enumerate(zip((_BRIGHTNESS, _CONTRAST, _SATURATION), factors, strict=True)):
        real[:, column] = _between(1 - spread, 1 + spread, factor)
    real[:, 3] = _between(*_SIGMA, sigma) * (blur < views.blur[view])
    return ViewDraws(torch.from_numpy(whole), torch.from_numpy(real), config.side_of_crop(side))


def draw_resized_crop(generator: torch.Generator, n: int, side: int, config: DatasetConfig) -> ViewDraws:
    """Return ``n`` draws of ``config.resized_crop`` and a flip for images of ``side`` pixels, on the CPU.

    They are distributed as in torchvision's ``RandomResizedCrop`` and ``RandomHorizontalFlip``.
    """
    crop = config.resized_crop
    assert crop.scale is not None
    sizes, unfit = _crop_sizes(generator, n, side, crop.scale, crop.ratio)
    top, left, flip = torch.rand((3, n), generator=generator).numpy()
    whole, real = _crop_tables(side, top, left, sizes, unfit)
    whole[:, 4] = flip < (0.5 if config.flip else 0.0)
    if config.color_jitter.is_on:
        _draw_jitter(generator, whole, real, config.color_jitter)
    return ViewDraws(torch.from_numpy(whole), torch.from_numpy(real), config.side_of_crop(side), crop.interpolation)


def draw_jitter(generator: torch.Generator, n: int, side: int, config: ColorJitterConfig) -> ViewDraws:
    """Return ``n`` draws of the colour jitter alone, for whole images of ``side`` pixels, on the CPU."""
    nothing = np.zeros(n)
    whole, real = _crop_tables(side, nothing, nothing, np.full((2, n), float(side)), np.zeros(0, np.int64))
    _draw_jitter(generator, whole, real, config)
    return ViewDraws(torch.from_numpy(whole), torch.from_numpy(real), side)


def _draw_jitter(
    generator: torch.Generator, whole: NDArray[np.int32], real: NDArray[np.float32], config: ColorJitterConfig
) -> None:
    """Fill the columns of the colour jitter, distributed as in torchvision's ``ColorJitter``.

    The conversion to hue and back rounds pixels, so a hue that is off has no step.
    """
    order, jitter, hue, *factors = torch.rand((6, len(whole)), generator=generator).numpy()
    whole[:, 5] = jitter < config.probability
    orders = _ORDERS if config.hue else np.where(_ORDERS == HUE, NO_STEP, _ORDERS)
    whole[:, 6:10] = orders[_up_to(order, len(orders) - 1)]
    whole[:, 10] = _between(-config.hue, config.hue, hue) * 255  # rounded towards 0, as in torchvision
    for column, (spread, factor) in enumerate(
        zip((config.brightness, config.contrast, config.saturation), factors, strict=True)
    ):
        real[:, column] = _between(max(0.0, 1 - spread), 1 + spread, factor)


def _crop_tables(
    side: int, top: _Numbers, left: _Numbers, sizes: _Numbers, unfit: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return both tables of ``ViewDraws`` with crops alone; ``top`` and ``left`` [n] are in 0..1.

    The crops of the images ``unfit`` are in the centre.
    """
    height, width = sizes
    whole, real = np.zeros((len(top), len(_WHOLE)), np.int32), np.zeros((len(top), len(_REAL)), np.float32)
    whole[:, 0] = _up_to(top, side - height)
    whole[:, 1] = _up_to(left, side - width)
    whole[unfit, 0], whole[unfit, 1] = (side - height[unfit]) // 2, (side - width[unfit]) // 2
    whole[:, 2], whole[:, 3] = height, width
    whole[:, 6:10] = range(4)
    return whole, real


def _crop_sizes(
    generator: torch.Generator, n: int, side: int, scale: Sequence[float], ratios: Sequence[float]
) -> tuple[_Numbers, NDArray[np.int64]]:
    """Return heights and widths [2, n], and the images [k] without a crop that fits.

    A size is the first of ten attempts that fits, else the largest of the allowed ratio that is nearest to 1.

    Args:
        scale: smallest and largest part of the area.
        ratios: smallest and largest ratio of width to height.
    """
    whole_ratio = min(max(1.0, ratios[0]), ratios[1])
    sizes = np.empty((2, n))
    sizes[0], sizes[1] = max(round(side / max(whole_ratio, 1.0)), 1), max(round(side * min(whole_ratio, 1.0)), 1)
    log_ratio = math.log(ratios[0]), math.log(ratios[1])
    left = np.arange(n)  # images without a crop that fits
    for _ in range(_TRIES):
        area, ratio = torch.rand((2, len(left)), dtype=torch.float64, generator=generator).numpy()
        area, ratio = _between(scale[0], scale[1], area) * side**2, np.exp(_between(log_ratio[0], log_ratio[1], ratio))
        drawn = np.sqrt([area / ratio, area * ratio]).round()
        fits = ((drawn >= 1) & (drawn <= side)).all(0)
        sizes[:, left[fits]] = drawn[:, fits]
        left = left[~fits]
        if not len(left):
            break
    return sizes, left


def _between(low: float, high: float, uniform: _Numbers) -> _Numbers:
    return low + (high - low) * uniform


def _up_to(uniform: _Numbers, last: _Numbers | int) -> NDArray[np.int64]:
    """Return whole numbers [n], uniform in 0..last."""
    return np.minimum((uniform * (np.asarray(last) + 1.0)).astype(np.int64), np.asarray(last, np.int64))
