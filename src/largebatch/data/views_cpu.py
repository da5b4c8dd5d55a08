"""``views.view`` on CPU: ``views_cpu.cpp``, compiled once for this machine."""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from largebatch import native
from largebatch.data.augment_cpu import address, check
from largebatch.data.view_draws import ViewDraws

_SOURCE = Path(__file__).with_suffix(".cpp")
why_not = partial(native.why_not, _SOURCE)


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("count", "channels", "side", "threads")),
        ("channels_last", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("pixels", "indices", "whole", "real", "mean", "std", "out")),
    )


def view_cpu(
    pixels: Tensor, indices: Tensor | None, draws: ViewDraws, mean: Tensor, std: Tensor, *, channels_last: bool = False
) -> Tensor:
    """Do the same as ``views.view`` for tensors on CPU, with ``torch.get_num_threads()`` threads.

    Raises:
        IndexError: if an index isn't in 0..M-1.
        ValueError: if a tensor isn't as ``views.view`` requires, or there are neither 1 nor 3 channels.
    """
    images, channels, side, _ = pixels.shape
    count = images if indices is None else len(indices)
    pixels = pixels.contiguous()
    check(pixels, torch.uint8, (images, 3 if channels == 3 else 1, side, side))
    check(indices, torch.int64, (count,))
    check(draws.whole, torch.int32, (count, 13))
    check(draws.real, torch.float32, (count, 4))
    check(mean, torch.float32, (channels,))
    check(std, torch.float32, (channels,))
    if indices is not None and count and (int(indices.min()) < 0 or int(indices.max()) >= images):
        raise IndexError(f"an index isn't in 0..{images - 1}")

    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(count, channels, side, side, memory_format=memory_format)
    mean, std = mean * 255, std * 255
    tensors = (pixels, indices, draws.whole, draws.real, mean, std, out)
    batch = _Batch(count, channels, side, torch.get_num_threads(), channels_last, *map(address, tensors))
    native.library(_SOURCE).view(ctypes.byref(batch))
    return out
