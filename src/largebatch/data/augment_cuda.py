"""``augment.augmented`` on CUDA: one launch of a Triton kernel (``augment_cuda_kernels.py``) for a batch.

Triton compiles the kernels at the first batch, which takes seconds, and keeps them on disk in its own cache. After that
a call may be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from largebatch import triton_kernels
from largebatch.config.datasets import DatasetConfig
from largebatch.data.draws import AnyDraws, Draws, ViewDraws, draw, draw_view
from largebatch.data.views import taps

Reference = Callable[..., Tensor]

_KERNELS = "largebatch.data.augment_cuda_kernels"
_CROP_CHUNK = 1024
_VIEW_WARPS, _VIEW_CHUNK = (4, 16), (512, 2048)  # for images of up to 32 x 32 pixels, and for larger ones
_OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}


def why_not(pixels: Tensor, draws: AnyDraws, channels_last: bool, reference: Reference) -> str:
    """Return the reason why the kernels can't augment such a batch on its device; empty if they can.

    The first call for a kind of batch compiles its kernel and compares it with ``reference``.
    """
    if reason := triton_kernels.why_not(_KERNELS, pixels.device):
        return reason
    _, channels, side, _ = pixels.shape
    if isinstance(draws, ViewDraws) and draws.side != side:
        return f"the kernel makes images of {side} pixels from images of {side} pixels, and not of {draws.side}"
    return _failed_trial(pixels.device, type(draws).__name__, channels, side, channels_last, reference)


def augmented(
    pixels: Tensor, indices: Tensor | None, draws: AnyDraws, mean: Tensor, std: Tensor, *, channels_last: bool = False
) -> Tensor:
    """Do the same as ``augment.augmented``, bit for bit as on CPU. Indices aren't checked.

    Raises:
        ValueError: if a tensor isn't as ``augment.augmented`` requires: the kernels read memory without further checks.
    """
    images, channels, side, _ = pixels.shape
    count = images if indices is None else len(indices)
    _check(pixels[:1], torch.uint8, (min(images, 1), channels, side, side))
    _check(indices, torch.int64, (count,))
    _check(mean, torch.float32, (channels,))
    _check(std, torch.float32, (channels,))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    result = torch.empty((count, channels, side, side), memory_format=memory_format, device=pixels.device)
    if count == 0:
        return result
    constants = {"SIDE": side, "CHANNELS": channels, "LAST": channels_last, **_OPTIONS}
    with torch.cuda.device_of(pixels):  # type: ignore[no-untyped-call]  # triton takes the current device
        if isinstance(draws, ViewDraws):
            _views(pixels, indices, draws, mean, std, result, constants)
        else:
            _crops(pixels, indices, draws, mean, std, result, constants)
    return result


def _crops(
    pixels: Tensor, indices: Tensor | None, draws: Draws | None, mean: Tensor, std: Tensor, result: Tensor,
    constants: dict[str, Any],
) -> None:  # fmt: skip
    table, padding = (None, 0) if draws is None else (draws.table, draws.padding)
    _check(table, torch.int32, (len(result), 8))
    parts = -(-result[0].numel() // _CROP_CHUNK)
    triton_kernels.imported(_KERNELS).crops[(len(result) * parts,)](
        pixels, indices, table, mean, std, result, pixels.stride(0), padding,
        CHUNK=_CROP_CHUNK, num_warps=4, **constants,
    )  # fmt: skip


def _views(
    pixels: Tensor, indices: Tensor | None, draws: ViewDraws, mean: Tensor, std: Tensor, result: Tensor,
    constants: dict[str, Any],
) -> None:  # fmt: skip
    count, channels, side, _ = result.shape
    if draws.side != side:
        raise ValueError(f"images of {side} pixels can't become images of {draws.side}")
    if channels not in (1, 3):
        raise ValueError(f"views of images with 1 or 3 channels only: {channels}")
    _check(draws.whole, torch.int32, (count, 13))
    _check(draws.real, torch.float32, (count, 4))
    warps, chunk = _VIEW_WARPS[side > 32], _VIEW_CHUNK[side > 32]
    scratch = torch.empty(count * 2 * channels * side**2, dtype=torch.uint8, device=pixels.device)
    triton_kernels.imported(_KERNELS).views[(count,)](
        pixels, indices, draws.whole, draws.real, _taps(side, draws.interpolation, pixels.device), mean, std, scratch,
        result, pixels.stride(0), CHUNK=chunk, LINES=32 * warps, num_warps=warps, **constants,
    )  # fmt: skip


@functools.cache
def _taps(side: int, interpolation: str, device: torch.device) -> Tensor:
    """Return the table of ``views``, computed on the CPU: int32 [side, 5, side]."""
    sizes = torch.arange(1, side + 1, dtype=torch.int32, device="cpu").view(-1, 1, 1, 1)
    positions, weights = taps(torch.zeros_like(sizes), sizes, side, side, interpolation)
    table = torch.cat([positions[..., :1], weights], 3).squeeze(1).transpose(1, 2)
    return table.to(device, torch.int32, memory_format=torch.contiguous_format)


def _check(tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` if a kernel can't read the tensor as an array of this type and shape."""
    if tensor is not None:
        given = (tensor.dtype, tuple(tensor.shape), tensor.is_contiguous())
        if given != (dtype, shape, True):
            raise ValueError(f"expected {dtype} {shape}, contiguous: {given}")


@functools.cache
def _failed_trial(
    device: torch.device, kind: str, channels: int, side: int, channels_last: bool, reference: Reference
) -> str:
    """Return the error of a small trial on this device; empty if there is none.

    The trial has the size of the run's images, so that it compiles the kernel that the run needs.
    """

    def trial() -> bool:
        pixels = torch.arange(4 * channels * side**2, device=device).mul(7919).remainder(256).to(torch.uint8)
        mean, std = torch.full((2, channels), 0.3, device=device).unbind()
        given = pixels.view(4, channels, side, side)
        draws = _trial_draws(kind, side, device)
        results = [
            [way(given, None, drawn, mean, std, channels_last=channels_last) for drawn in draws]
            for way in (augmented, reference)
        ]
        return all(map(torch.equal, *results))

    return triton_kernels.failure(trial, "augmentation in one kernel")


def _trial_draws(kind: str, side: int, device: torch.device) -> list[AnyDraws]:
    generator = torch.Generator().manual_seed(0)
    if kind == "ViewDraws":
        config = DatasetConfig(name="trial", flip=True)
        return [draw_view(generator, 4, side, config, view).to(device) for view in range(2)]
    if kind == "Draws":
        return [draw(generator, 4, padding=2, flip=True, rotation=10.0, side=side).to(device)]
    return [None]
