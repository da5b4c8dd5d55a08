"""``augment.augmented`` on CPU: ``augment_cpu.cpp``, compiled once for this machine."""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from largebatch import native
from largebatch.data.draws import Draws

_SOURCE = Path(__file__).with_suffix(".cpp")
why_not = partial(native.why_not, _SOURCE)


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("pixels", "indices", "draws", "mean", "std", "result")),
        *((name, ctypes.c_int64) for name in ("images", "image_stride", "count")),
        *((name, ctypes.c_int32) for name in ("channels", "side", "padding", "threads")),
        ("channels_last", ctypes.c_bool),
    )


def augmented(
    pixels: Tensor,
    indices: Tensor | None,
    draws: Draws | None,
    mean: Tensor,
    std: Tensor,
    *,
    channels_last: bool = False,
) -> Tensor:
    """Do the same as ``augment.augmented``, with ``torch.get_num_threads()`` threads.

    Raises:
        IndexError: if an index isn't in 0..M-1.
        ValueError: if a tensor isn't as ``augment.augmented`` requires: C++ reads its memory without further checks.
    """
    images, channels, side, _ = pixels.shape
    count = images if indices is None else len(indices)
    table = None if draws is None else draws.table
    check(pixels[:1], torch.uint8, (min(images, 1), channels, side, side))
    check(indices, torch.int64, (count,))
    check(table, torch.int32, (count, 8))
    check(mean, torch.float32, (channels,))
    check(std, torch.float32, (channels,))

    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    result = torch.empty((count, channels, side, side), memory_format=memory_format)
    mean, std = mean * 255, std * 255
    padding = 0 if draws is None else draws.padding
    sizes = (images, pixels.stride(0), count, channels, side, padding, torch.get_num_threads())
    batch = _Batch(*map(address, (pixels, indices, table, mean, std, result)), *sizes, channels_last)
    compiled = native.library(_SOURCE)
    compiled.augment.restype = ctypes.c_bool
    if not compiled.augment(ctypes.byref(batch)):
        raise IndexError(f"an index isn't in 0..{images - 1}")
    return result


def check(tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` if C++ can't read the tensor as an array of this type and shape."""
    if tensor is not None:
        given = (tensor.dtype, tuple(tensor.shape), tensor.device.type, tensor.is_contiguous())
        if given != (dtype, shape, "cpu", True):
            raise ValueError(f"expected {dtype} {shape} on cpu, contiguous: {given}")


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
