"""Images and labels of a split: pixels in memory, or encoded images that are decoded when they are needed."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from largebatch.data.encoded import EncodedImages, FileImages, Source, encoded, readable
from largebatch.errors import UserError

MODES = {1: "L", 3: "RGB"}
_TASK = 16  # images that a thread takes at a time
_BLOCK_BYTES = 64 << 20  # pixels that are decoded together


@dataclass(frozen=True)
class MemoryImages:
    """``pixels``: uint8 [N, C, S, S]."""

    pixels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def channels(self) -> int:
        return int(self.pixels.shape[1])

    @property
    def image_size(self) -> int:
        return int(self.pixels.shape[2])

    def select(self, indices: Tensor) -> MemoryImages:
        return MemoryImages(self.pixels[indices])


Images = MemoryImages | EncodedImages


def decoded_bytes(images: Images) -> int:
    return len(images) * images.channels * images.image_size**2


@dataclass(frozen=True)
class Split:
    """``images`` in memory or encoded; ``labels`` int64 [N], in the order of the images."""

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


def decoded_blocks(images: EncodedImages, threads: int) -> Iterator[tuple[NDArray[np.uint8], list[int]]]:
    """Decode all images in order in threads (PIL releases the interpreter's lock); yield blocks of about 64 MiB.

    A block is the pixels, uint8 [n, C, S, S], of the images that can be read, and the indices of those that can't.
    """

    def decode_to(place: NDArray[np.uint8], i: int) -> bool:
        try:
            place[:] = decode(images.source(i), images.channels, images.image_size)
        except UserError:
            return False
        return True

    shape = (images.channels, images.image_size, images.image_size)
    size = max(_BLOCK_BYTES // max(math.prod(shape), 1), _TASK * threads)
    with ThreadPool(threads) as pool:
        for first in range(0, len(images), size):
            block = range(first, min(first + size, len(images)))
            pixels = np.empty((len(block), *shape), np.uint8)
            readable = np.array(pool.starmap(decode_to, zip(pixels, block, strict=True), chunksize=_TASK))
            yield pixels if readable.all() else pixels[readable], [first + int(i) for i in np.flatnonzero(~readable)]


def decode(source: Source, channels: int, image_size: int) -> NDArray[np.uint8]:
    """Decode an image file or a row to uint8 [C, S, S].

    The shorter side is resized to ``image_size`` (bilinear, antialiased), then the centre is cropped, as in
    torchvision's ``Resize(S)`` and ``CenterCrop(S)``. Transparency is dropped; 16-bit grey keeps its upper 8 bits. Grey
    of 32-bit integers or floats has no defined white: it is scaled from its own minimum and maximum to 0 and 255. An
    animation gives its first image. An ``image_size`` of 0 only checks that the image can be read.

    Raises:
        UserError: if it can't be read as a whole image.
    """
    with readable(source), Image.open(io.BytesIO(encoded(source))) as opened:
        return pixels_of(opened, channels, image_size)


def pixels_of(image: Image.Image, channels: int, image_size: int) -> NDArray[np.uint8]:
    """Convert an image to uint8 [C, S, S], as ``decode`` does."""
    image = in_mode(image, MODES[channels])
    if image_size == 0:
        return np.empty((channels, 0, 0), np.uint8)
    return planes(resized(image, image_size))


def planes(image: Image.Image) -> NDArray[np.uint8]:
    """Return uint8 [C, H, W] of an image in PIL's mode L or RGB."""
    array: NDArray[np.uint8] = np.asarray(image)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to PIL's mode L or RGB, as ``decode`` describes."""
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if sixteen_bits:  # PIL would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = Image.fromarray(_stretched(np.asarray(image).astype(np.float64)))
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    image.load()
    return image if image.mode == mode else image.convert(mode)  # which would copy


def _stretched(grey: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Scale finite values from their minimum and maximum to 0 and 255."""
    low, high = grey.min(), grey.max()
    if not np.isfinite(high - low):
        raise ValueError("it has infinite or undefined values")
    scaled: NDArray[np.float64] = np.rint((grey - low) * (255 / (high - low or 1)))
    return scaled.astype(np.uint8)


def resized(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to ``size`` and crop the centre."""
    width, height = image.size
    if (width, height) == (size, size):
        return image
    short = min(width, height)
    width, height = size * width // short, size * height // short
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def centre(pixels: Tensor, size: int) -> Tensor:
    """Return the centre of square images [N, C, S, S], contiguous [N, C, size, size], as torchvision's CenterCrop."""
    first = round((pixels.shape[2] - size) / 2)
    part = slice(first, first + size)
    return pixels[:, :, part, part].contiguous()


def resize(pixels: Tensor, image_size: int) -> Tensor:
    """Resize square images, uint8 [N, C, S, S], as files are resized (bilinear, antialiased)."""
    size = (image_size, image_size)
    if pixels.shape[2:] == size:
        return pixels
    resized = [interpolate(part, size, mode="bilinear", antialias=True) for part in torch.split(pixels, 1024)]
    return torch.cat(resized)
