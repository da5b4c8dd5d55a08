"""Random resized crops from the pixels of image files, in the decoding processes.

A seed for each crop decides its box, because only the process that opens the file knows its width and height. The
main process draws the seeds from the step's seed.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from largebatch.config.datasets import DatasetConfig
from largebatch.data.encoded import Source, encoded, readable
from largebatch.data.images import MODES, in_mode, planes
from largebatch.data.regions import Box, decoded_region
from largebatch.data.resizing import RESAMPLING, resized_planes
from largebatch.seeding import derive_seed

_TRIES = 10  # attempts to draw a box that fits, as in torchvision
_SEEDS = 1 << 62
_REDUCTIONS = (8, 4, 2)  # JPEG's own scales that PIL offers: 1/8, 1/4, 1/2
_SPARE = 2  # pixels of the reduced crop for a pixel of the result, at least, so that the reduction hardly shows


@dataclass(frozen=True)
class FileCrop:
    """torchvision's ``RandomResizedCrop`` of files.

    Attributes:
        scale: smallest and largest part of the file's area.
        ratio: smallest and largest ratio of width to height.
        interpolation: ``bicubic`` or ``bilinear``, antialiased.
        side: of the result in pixels.
        views: number of crops of each file.
    """

    scale: tuple[float, float]
    ratio: tuple[float, float]
    interpolation: str
    side: int
    views: int = 1

    def rows(self, indices: Tensor, seed: int, step: int) -> Tensor:
        """Return int64 [n, 1 + views] for a step's global batch: each image's index and the seeds of its crops."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "crop", step))
        return torch.cat([indices[:, None], torch.randint(_SEEDS, (len(indices), self.views), generator=generator)], 1)

    def cut(self, source: Source, channels: int, seeds: Sequence[int]) -> NDArray[np.uint8]:
        """Decode an image once and return a crop for each seed, uint8 [views, C, S, S].

        Modes are converted as by ``decode``. A JPEG's crops that are at least four times the result in both directions
        are taken from the JPEG decoded at half, a quarter or an eighth of its size. Other crops have the pixels of
        torchvision's ``resized_crop`` on the PIL image.

        Raises:
            UserError: if it can't be read as an image.
        """
        with readable(source):
            data = encoded(source)
            with Image.open(io.BytesIO(data)) as opened:
                boxes = [random_box(Random(seed), *opened.size, self.scale, self.ratio) for seed in seeds]
                return np.stack(self._crops(data, opened, MODES[channels], boxes))

    def _crops(self, data: bytes, opened: Image.Image, mode: str, boxes: list[Box]) -> list[NDArray[np.uint8]]:
        is_jpeg = opened.format == "JPEG"
        reduction = min(reduction_of(box, self.side) for box in boxes) if is_jpeg else 1
        if reduction > 1:
            opened.draft(None, (opened.width // reduction, opened.height // reduction))
            image = in_mode(opened, mode)
            size, resampling = (self.side, self.side), RESAMPLING[self.interpolation]
            scaled = [tuple(edge / reduction for edge in box) for box in boxes]
            return [planes(image.resize(size, resampling, box)) for box in scaled]  # type: ignore[arg-type]
        left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
        around = (left, top, max(box[2] for box in boxes), max(box[3] for box in boxes))
        pixels = decoded_region(data, around) if is_jpeg and opened.mode in ("RGB", "L") else None
        if pixels is None:
            pixels = np.asarray(in_mode(opened, mode).crop(around))
        elif mode == "L":
            pixels = np.asarray(Image.fromarray(pixels).convert("L"))
        crops = [pixels[box[1] - top : box[3] - top, box[0] - left : box[2] - left] for box in boxes]
        return [resized_planes(crop, self.side, self.interpolation) for crop in crops]


def file_crop(config: DatasetConfig, side: int, views: int) -> FileCrop | None:
    """Return the crops that training takes from files, to images of ``side`` pixels. None: it takes none from files."""
    crop = config.resized_crop
    if crop.source != "file" or (views == 1 and crop.scale is None):
        return None
    if views > 1:
        return FileCrop((config.views.min_area, 1.0), config.views.RATIO, "bicubic", side, views)
    assert crop.scale is not None
    return FileCrop((crop.scale[0], crop.scale[1]), (crop.ratio[0], crop.ratio[1]), crop.interpolation, side)


def random_box(random: Random, width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Box:
    """Return the box of torchvision's ``RandomResizedCrop.get_params`` for an image of ``width`` and ``height``.

    The first of ten attempts that fits, else the centre: the largest box whose ratio is nearest to the image's.
    """
    for _ in range(_TRIES):
        area = width * height * random.uniform(*scale)
        aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.random() * (width - w + 1)), int(random.random() * (height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = max(round(width / ratio[0]), 1)
    elif width / height > ratio[1]:
        w = max(round(height * ratio[1]), 1)
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def reduction_of(box: Box, side: int) -> int:
    """Return the largest of JPEG's reductions that leaves a crop twice ``side`` pixels in both directions, or 1."""
    shorter = min(box[2] - box[0], box[3] - box[1])
    return next((reduction for reduction in _REDUCTIONS if shorter >= _SPARE * reduction * side), 1)
