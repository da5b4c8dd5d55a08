"""``views.view`` on CPU: ``views_cpu.cpp``, compiled once for this machine."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from largebatch import native
from largebatch.data.augment_cpu import address
from largebatch.data.view_draws import ViewDraws

_SOURCE = Path(__file__).with_suffix(".cpp")


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("count", "channels", "side", "threads")),
        ("channels_last", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("pixels", "indices", "whole", "real", "mean", "std", "out")),
    )


def why_not() -> str:
    """Return the reason why there is no compiled code; empty if there is."""
    return native.why_not(_SOURCE)


def view_cpu(
    pixels: Tensor, indices: Tensor | None, draws: ViewDraws, mean: Tensor, std: Tensor, *, channels_last: bool = False
) -> Tensor:
    """Do the same as ``views.view`` for tensors on CPU, with ``torch.get_num_threads()`` threads.

    Raises:
        IndexError: if an index isn't in 0..M-1.
        ValueError: if there isn't one row of draws per image, or pixels aren't uint8 squares of 1 or 3 channels.
    """
    images, channels, height, side = pixels.shape
    count = images if indices is None else len(indices)
    if pixels.dtype != torch.uint8 or height != side or channels not in (1, 3):
        raise ValueError(f"pixels are {pixels.dtype} {list(pixels.shape)}, not uint8 [images, 1 or 3, side, side]")
    if len(draws) != count:
        raise ValueError(f"{len(draws)} rows of draws for {count} images")
    if indices is not None and count and (int(indices.min()) < 0 or int(indices.max()) >= images):
        raise IndexError(f"an index lies outside the {images} images")

    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(count, channels, side, side, memory_format=memory_format)
    given = [
        pixels, None if indices is None else indices.long(), draws.whole.int(), draws.real.float(),
        mean.float() * 255, std.float() * 255,
    ]  # fmt: skip
    tensors = [None if tensor is None else tensor.contiguous() for tensor in given]  # a variable keeps them alive
    sizes = (count, channels, side, torch.get_num_threads())
    batch = _Batch(*sizes, channels_last, *map(address, (*tensors, out)))
    native.library(_SOURCE).view(ctypes.byref(batch))
    return out
