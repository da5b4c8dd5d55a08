"""``images.png``: images of one batch as the network sees them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

_IMAGES = 16
_COLUMNS = 8
_SMALLEST = 64  # least side of a shown image, in pixels


def save_images(batch: Tensor, views: int, mean: tuple[float, ...], std: tuple[float, ...], path: Path) -> None:
    """Write a grid of the first images of a batch, with the normalisation undone.

    Args:
        batch: the network's input, float32 [views * n, C, S, S]: all first views, then all second views.
        views: number of views of an image; two views are shown one above the other.
        mean: per channel, of pixels in 0..1.
        std: likewise.
        path: the PNG file.
    """
    from PIL import Image

    n = min(len(batch) // views, _IMAGES // views)
    shown = torch.stack([view[:n] for view in batch.chunk(views)]).float().cpu()  # [views, n, C, S, S]
    scale = (len(mean), 1, 1)
    pixels = (shown * torch.tensor(std).view(scale) + torch.tensor(mean).view(scale)).clamp(0, 1)
    rows = [view[at : at + _COLUMNS] for at in range(0, n, _COLUMNS) for view in pixels]
    grid = torch.cat([_row(row) for row in rows], dim=1)
    times = -(-_SMALLEST // pixels.shape[-1])
    array = (255 * grid).round().to(torch.uint8).movedim(0, -1).squeeze(-1).numpy()
    image = Image.fromarray(array)
    temporary = path.with_name(f".{path.name}.tmp")
    image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST).save(temporary, format="PNG")
    os.replace(temporary, path)


def _row(images: Tensor) -> Tensor:
    """Join [n, C, S, S] to [C, S, _COLUMNS * S], padded with black."""
    missing = images.new_zeros(_COLUMNS - len(images), *images.shape[1:])
    return torch.cat([*images, *missing], dim=2)
