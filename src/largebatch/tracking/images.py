"""``images.png``: images of one batch as the network sees them. ``worst.png``: test images with the largest loss."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from largebatch.runs.folder import replace_file

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
    n = min(len(batch) // views, _IMAGES // views)
    shown = torch.stack([view[:n] for view in batch.chunk(views)]).float().cpu()  # [views, n, C, S, S]
    scale = (len(mean), 1, 1)
    pixels = (shown * torch.tensor(std).view(scale) + torch.tensor(mean).view(scale)).clamp(0, 1)
    side = -(-_SMALLEST // pixels.shape[-1]) * pixels.shape[-1]
    _save_grid(pixels, side, path)


def save_worst(pixels: Tensor, path: Path) -> None:
    """Write a grid of images, uint8 [n, C, S, S], each 64 pixels wide, so that the file stays small."""
    _save_grid(pixels[None].float().cpu() / 255, _SMALLEST, path)


def _save_grid(pixels: Tensor, side: int, path: Path) -> None:
    """Write a grid of images [views, n, C, S, S] in 0..1, each ``side`` pixels wide."""
    from PIL import Image

    views = len(pixels)
    filled = torch.cat(
        [pixels, pixels.new_zeros(views, -pixels.shape[1] % _COLUMNS, *pixels.shape[2:])], dim=1
    )  # with black
    rows = torch.unflatten(filled, 1, (-1, _COLUMNS)).permute(1, 0, 4, 2, 5, 3)  # [rows, views, S, _COLUMNS, S, C]
    grid = rows.flatten(0, 2).flatten(1, 2)
    image = Image.fromarray((255 * grid).round().to(torch.uint8).squeeze(-1).numpy())
    how = Image.Resampling.NEAREST if side >= pixels.shape[-1] else Image.Resampling.BILINEAR
    size = (side * _COLUMNS, side * image.height // pixels.shape[-1])
    replace_file(path, partial(image.resize(size, how).save, format="PNG"))
