"""Choice of the place of a data set's pixels: the device's memory, the host's memory, or their files."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from largebatch.data.images import MemoryImages, Split

Place = Literal["device", "host", "files"]

_MOST = 8 << 30  # bytes of memory that data takes by default, at most
_PIECE_BYTES = 64 << 20


def choose_location(
    location: str, decoded_bytes: int, device_free: int | None, host_free: int, in_memory: bool = False
) -> tuple[Place, str]:
    """Return the place of ``decoded_bytes`` of pixels by ``dataset.location``, and the reason if it isn't the device.

    ``device_free`` and ``host_free`` are free bytes; ``device_free`` is None if the device's memory is the host's.
    ``auto`` takes the device, and ``host`` the host's memory, for at most a quarter of the free memory and at most 8
    GiB; ``device`` takes up to 80 % of the device's free memory. Pixels that don't fit on the device go to the host's
    memory, and pixels that don't fit there stay in their files. Pixels that are ``in_memory`` already stay there.
    """
    why = f"{in_words(decoded_bytes)} of pixels are "
    if device_free is not None and location != "host":
        room, rule = (device_free * 4 // 5, "80 %") if location == "device" else _room(device_free)
        if decoded_bytes <= room:
            return "device", ""
        why += f"more than {rule} of the device's {in_words(device_free)} of free memory, and "
    room, rule = _room(host_free)
    if in_memory or decoded_bytes <= room:
        return "host", f"{why}stay in the host's memory"
    why += f"more than {rule} of the host's {in_words(host_free)} of free memory"
    return "files", f"{why}, so images are decoded while training"


def _room(free: int) -> tuple[int, str]:
    """Return the default limit in bytes, and in words."""
    if free // 4 > _MOST:
        return _MOST, f"{in_words(_MOST)}, the default limit,"
    return free // 4, "a quarter"


def in_words(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def on_device(split: Split, indices: Tensor | None, device: torch.device) -> Split:
    """Copy the images and labels (all, or at ``indices``) of a split in memory to ``device``.

    The copy goes piece by piece, so that it needs no other memory on the device and no second copy on the host.
    """
    assert isinstance(split.images, MemoryImages)
    pixels, labels = split.images.pixels, split.labels
    if indices is not None:
        labels = labels[indices]
    moved = torch.empty(len(labels), *pixels.shape[1:], dtype=torch.uint8, device=device)
    size = max(_PIECE_BYTES // pixels[0].numel(), 1)
    for first in range(0, len(labels), size):
        piece = slice(first, first + size)
        moved[piece] = pixels[piece] if indices is None else pixels[indices[piece]]
    return Split(MemoryImages(moved), labels.to(device))
