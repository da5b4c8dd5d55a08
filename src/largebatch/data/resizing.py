"""Pillow's antialiased resize to a square, in C++ with the same bytes (``resize_cpu.cpp``), else by Pillow itself."""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from largebatch import native
from largebatch.data.images import planes

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_SOURCE = Path(__file__).with_name("resize_cpu.cpp")
_LARGEST = 1 << 24  # bytes of an image in C++, which keeps two copies for the next image
_TRIALS = ((23, 41), (90, 19), (7, 5))  # heights and widths: Pillow's two orders of passes, and an enlargement

Pixels = NDArray[np.uint8]


def resized_planes(pixels: Pixels, side: int, interpolation: str) -> Pixels:
    """Resize uint8 [H, W] or [H, W, 3] to [C, side, side]; ``interpolation`` is ``bicubic`` or ``bilinear``."""
    kernel = kernel_or_none()
    if kernel is None or pixels.size > _LARGEST:
        return _by_pillow(pixels, side, interpolation)
    return _by_kernel(kernel, pixels, side, interpolation)


@functools.cache
def kernel_or_none() -> ctypes.CDLL | None:
    """Return the compiled code. None without a compiler, or if its bytes aren't those of the installed Pillow."""
    if native.why_not(_SOURCE):
        return None
    kernel, random = native.library(_SOURCE), np.random.default_rng(0)
    for shape in _TRIALS:
        pixels = random.integers(0, 256, (*shape, 3), dtype=np.uint8)
        for interpolation in RESAMPLING:
            expected = _by_pillow(pixels, 11, interpolation)
            if not np.array_equal(_by_kernel(kernel, pixels, 11, interpolation), expected):
                warnings.warn(f"resize_cpu.cpp differs from Pillow {PIL.__version__}, so Pillow resizes", stacklevel=2)
                return None
    return kernel


def _by_kernel(kernel: ctypes.CDLL, pixels: Pixels, side: int, interpolation: str) -> Pixels:
    pixels = np.ascontiguousarray(pixels)
    height, width, channels = (*pixels.shape, 1)[:3]
    result: Pixels = np.empty((channels, side, side), np.uint8)
    kernel.resize(
        ctypes.c_void_p(pixels.ctypes.data), height, width, channels, side, interpolation == "bilinear",
        ctypes.c_void_p(result.ctypes.data),
    )  # fmt: skip
    return result


def _by_pillow(pixels: Pixels, side: int, interpolation: str) -> Pixels:
    return planes(Image.fromarray(pixels).resize((side, side), RESAMPLING[interpolation]))
