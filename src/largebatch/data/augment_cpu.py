"""``augment.augmented`` on CPU: ``augment_cpu.cpp`` and ``views_cpu.cpp``, compiled once for this machine."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from largebatch import native
from largebatch.data.draws import AnyDraws, ViewDraws


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("pixels", "indices", "whole", "real", "mean", "std", "result")),
        *((name, ctypes.c_int64) for name in ("images", "image_stride", "count")),
        *((name, ctypes.c_int32) for name in ("channels", "side", "padding", "threads")),
        *((name, ctypes.c_bool) for name in ("channels_last", "bilinear")),
    )


def why_not(draws: AnyDraws = None, side: int | None = None) -> str:
    """Return the reason why C++ can't augment images of ``side`` pixels with such draws here; empty if it can."""
    if isinstance(draws, ViewDraws) and side not in (None, draws.side):
        return f"it makes images of {side} pixels from images of {side} pixels, and not of {draws.side}"
    return native.why_not(_source(draws))


def augmented(
    pixels: Tensor, indices: Tensor | None, draws: AnyDraws, mean: Tensor, std: Tensor, *, channels_last: bool = False
) -> Tensor:
    """Do the same as ``augment.augmented``, with ``torch.get_num_threads()`` threads.

    Raises:
        IndexError: if an index isn't in 0..M-1.
        ValueError: if a tensor isn't as ``augment.augmented`` requires: C++ reads its memory without further checks.
    """
    images, channels, side, _ = pixels.shape
    count = images if indices is None else len(indices)
    allowed, whole, real, padding, bilinear = channels, None, None, 0, False
    if isinstance(draws, ViewDraws):
        if draws.side != side:
            raise ValueError(f"images of {side} pixels can't become images of {draws.side}")
        bilinear = draws.interpolation == "bilinear"
        allowed, whole, real = 3 if channels == 3 else 1, draws.whole, draws.real
    elif draws is not None:
        whole, padding = draws.table, draws.padding
    _check(pixels[:1], torch.uint8, (min(images, 1), allowed, side, side))
    _check(indices, torch.int64, (count,))
    _check(whole, torch.int32, (count, 8 if real is None else 13))
    _check(real, torch.float32, (count, 4))
    _check(mean, torch.float32, (channels,))
    _check(std, torch.float32, (channels,))

    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    result = torch.empty((count, channels, side, side), memory_format=memory_format)
    tensors = (pixels, indices, whole, real, mean * 255, std * 255, result)
    sizes = (images, pixels.stride(0), count, channels, side, padding, torch.get_num_threads())
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    compiled = native.library(_source(draws))
    compiled.augment.restype = ctypes.c_bool
    if not compiled.augment(ctypes.byref(_Batch(*addresses, *sizes, channels_last, bilinear))):
        raise IndexError(f"an index isn't in 0..{images - 1}")
    return result


def _source(draws: AnyDraws) -> Path:
    return Path(__file__).with_name("views_cpu.cpp" if isinstance(draws, ViewDraws) else "augment_cpu.cpp")


def _check(tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` if C++ can't read the tensor as an array of this type and shape."""
    if tensor is not None:
        given = (tensor.dtype, tuple(tensor.shape), tensor.device.type, tensor.is_contiguous())
        if given != (dtype, shape, "cpu", True):
            raise ValueError(f"expected {dtype} {shape} on cpu, contiguous: {given}")
