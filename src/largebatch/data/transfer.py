"""Copies from host memory to the device, without waiting for it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy ``tensor`` to ``device``; to a GPU from pinned memory, in the order of its stream."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def one_ahead(tensors: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield each of ``tensors`` (host memory) on ``device``; a GPU copies on another stream, one tensor ahead."""
    if device.type != "cuda":
        yield from (tensor.to(device) for tensor in tensors)
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def upload(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(copying):
            return to_device(tensor, device), copying.record_event()

    uploads = map(upload, tensors)
    coming = next(uploads, None)
    while coming is not None:
        uploaded, done = coming
        coming = next(uploads, None)
        using = torch.cuda.current_stream(device)
        using.wait_event(done)
        uploaded.record_stream(using)  # so that its memory isn't reused while it is read
        yield uploaded
