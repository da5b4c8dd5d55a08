"""Augmentation and normalisation of a batch in one call, with one draw an image.

With ``Draws``, the pixels are those of torchvision's PIL chain ``RandomCrop(S, padding) -> RandomHorizontalFlip ->
RandomRotation`` at equal parameters: the rotation is PIL's nearest-neighbour rotation in 16-bit fixed point arithmetic.
Pixels from outside the crop are 0, also at positions where the padded image has a pixel, as in the chain. With
``ViewDraws``, they are a random resized crop or a view of Barlow Twins (``views.py``), which may be smaller than the
image.

On CPU the code is C++ (``augment_cpu.py``), on CUDA a Triton kernel (``augment_cuda.py``). On other devices, and
without a compiler, it is torch. All give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from largebatch.data import augment_cpu, augment_cuda
from largebatch.data.draws import AnyDraws, Draws, ViewDraws
from largebatch.data.views import viewed

# Numbers at once in torch on CPU, to fit the processor's cache.
_PIXELS = 1 << 19
_VIEWS = 32  # 128: 1.2 times the time


def augmented(
    pixels: Tensor, indices: Tensor | None, draws: AnyDraws, mean: Tensor, std: Tensor, *, channels_last: bool = False
) -> Tensor:
    """Augment and normalise the images at ``indices``: ``(image / 255 - mean) / std``. All tensors are on one device.

    The call doesn't copy to the device or wait for it.

    Args:
        pixels: uint8 [M, C, S, S], each image contiguous; a whole data set, of which only the images at ``indices`` are
            read. C is 1 or 3 for views; with C = 1 their grayscale, saturation and hue do nothing, as in torchvision.
        indices: int64 [n]; None for all images, in order.
        draws: of length n, drawn for images of S pixels; None only normalises. ``ViewDraws`` may be for a smaller side.
        mean, std: float32 [C], for pixels in 0..1.
        channels_last: the memory format of the result.

    Returns:
        float32 [n, C, S, S]; with ``ViewDraws``, S is their side.

    Raises:
        IndexError: on CPU, if an index isn't in 0..M-1.
        ValueError: on CPU, if shapes or types don't fit.
    """
    function = augmented_torch
    if pixels.device.type == "cpu":
        if not augment_cpu.why_not(draws, pixels.shape[2]):
            function = augment_cpu.augmented
    elif not torch.compiler.is_compiling() and not augment_cuda.why_not(pixels, draws, channels_last, augmented_torch):
        function = augment_cuda.augmented
    return function(pixels, indices, draws, mean, std, channels_last=channels_last)


def augmented_torch(
    pixels: Tensor, indices: Tensor | None, draws: AnyDraws, mean: Tensor, std: Tensor, *, channels_last: bool = False
) -> Tensor:
    """Do the same as ``augmented`` in torch, on any device; for ``torch.compile`` too."""
    n, side = len(pixels) if indices is None else len(indices), pixels.shape[2]
    at_once = _VIEWS if isinstance(draws, ViewDraws) else max(_PIXELS // side**2, 1)
    if pixels.device.type == "cpu" and n > at_once and not torch.compiler.is_compiling():
        chosen = torch.arange(n) if indices is None else indices
        results = []
        for part in (slice(first, first + at_once) for first in range(0, n, at_once)):
            drawn = None if draws is None else draws[part]
            results.append(augmented_torch(pixels, chosen[part], drawn, mean, std, channels_last=channels_last))
        return torch.cat(results)

    images = pixels if indices is None else pixels[indices]
    if isinstance(draws, ViewDraws):
        images = viewed(images, draws)
    elif draws is not None:
        position, inside = _sources(draws, side)
        index = position.long().unsqueeze(1).expand(images.shape)
        images = images.flatten(2).gather(2, index.flatten(2)).view_as(images).mul_(inside.unsqueeze(1))
    images = images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return (images - (mean * 255).view(-1, 1, 1)).div_((std * 255).view(-1, 1, 1))  # in float32


def _sources(draws: Draws, side: int) -> tuple[Tensor, Tensor]:
    """Return each pixel's source, int32 [N, S, S] in 0..S*S-1, and True if it has one, bool [N, S, S]."""
    top, left, flip, cos, sin, minus_sin, first_row, first_column = draws.table[:, :, None, None].unbind(1)
    across = torch.arange(side, dtype=torch.int32, device=draws.table.device)
    down = across[:, None]
    column = ((first_column + sin * down) + cos * across).bitwise_right_shift_(16)
    row = ((first_row + cos * down) + minus_sin * across).bitwise_right_shift_(16)

    # The crop's row 0 is the image's row `top - padding`; flipped, its column 0 is the image's column `left - padding`
    # plus S - 1. Only rows and columns that lie both in the crop and in the image are used.
    top, left = top - draws.padding, left - draws.padding
    before = torch.where(flip.bool(), left, -left)  # columns of the crop before the image begins
    inside = (row >= (-top).clamp(min=0)).logical_and_(row < (side - top).clamp(max=side))
    inside.logical_and_(column >= before.clamp(min=0)).logical_and_(column < (side + before).clamp(max=side))
    step = 1 - 2 * flip
    origin = top * side + left + flip * (side - 1)
    position = row.mul_(side).add_(column.mul_(step)).add_(origin).mul_(inside)
    return position, inside
