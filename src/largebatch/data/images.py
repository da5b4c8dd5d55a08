"""Where the pixels of a split are: in memory, or in files that are decoded when they are fetched."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from largebatch.errors import UserError

_MODES = {1: "L", 3: "RGB"}


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


@dataclass(frozen=True)
class FileImages:
    """Image files of any size and mode, brought to ``channels`` (1 or 3) and ``image_size`` pixels by ``decode``."""

    paths: tuple[str, ...]
    channels: int
    image_size: int

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def decoded_bytes(self) -> int:
        return len(self) * self.channels * self.image_size**2

    def select(self, indices: Tensor) -> FileImages:
        return FileImages(tuple(self.paths[i] for i in indices.tolist()), self.channels, self.image_size)

    def to_memory(self) -> MemoryImages:
        """Decode every file, in threads (PIL lets go of the interpreter while it decodes)."""
        pixels = np.empty((len(self), self.channels, self.image_size, self.image_size), dtype=np.uint8)

        def decode_part(first: int) -> None:
            for i in range(first, min(first + 64, len(self))):
                pixels[i] = decode(self.paths[i], self.channels, self.image_size)

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for _ in pool.map(decode_part, range(0, len(self), 64)):
                pass  # asks for the results only to raise the first error
        return MemoryImages(torch.from_numpy(pixels))


Images = MemoryImages | FileImages


def decode(path: str, channels: int, image_size: int) -> NDArray[np.uint8]:
    """One image file as uint8 [C, S, S].

    The shorter side is resized to ``image_size`` (bilinear, antialiased), then the centre is cropped, as torchvision's
    ``Resize(S)`` and ``CenterCrop(S)`` do. Transparency is dropped; 16-bit grey keeps its upper 8 bits.

    Raises:
        UserError: when the file can't be read as an image, whole.
    """
    try:
        with Image.open(path) as opened:
            image = _in_mode(opened, _MODES[channels])
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        IndexError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise UserError(
            f"{path} can't be read as an image ({error}): the file is damaged or cut short; replace or remove it"
        ) from error
    array = np.asarray(_resized(image, image_size))
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):  # PIL itself would cut off at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def _resized(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    if (width, height) == (size, size):
        return image
    short = min(width, height)
    width, height = size * width // short, size * height // short
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def resize(images: MemoryImages, image_size: int) -> MemoryImages:
    """Square images in memory, resized like files (bilinear, antialiased)."""
    parts = torch.split(images.pixels, 1024)
    size = (image_size, image_size)
    return MemoryImages(torch.cat([interpolate(part, size, mode="bilinear", antialias=True) for part in parts]))
