"""Random numbers of the two Barlow Twins views, drawn for a whole batch at once.

The recipe is that of ``facebookresearch/barlowtwins``, in its order: resized crop (scale 0.08..1, ratio 3/4..4/3,
bicubic), flip, colour jitter (brightness 0.4, contrast 0.4, saturation 0.2, hue 0.1; with probability 0.8, its four
steps in random order), grayscale (0.2), Gaussian blur (sigma 0.1..2 pixels) and solarize. Each view has its own
smallest scale and probabilities. Each number is distributed as in torchvision's transforms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from largebatch.config.datasets import DatasetConfig
from largebatch.data.transfer import to_device

_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 0.4, 0.4, 0.2, 0.1
_SIGMA = (0.1, 2.0)
_TRIES = 10  # attempts to find a crop that fits into the image

# Numbers of the colour jitter's steps in ViewDraws.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_WHOLE = (
    *("top", "left", "height", "width", "flip", "jitter"),
    *("step0", "step1", "step2", "step3", "hue", "gray", "solarize"),
)
_REAL = ("brightness", "contrast", "saturation", "sigma")


@dataclass(frozen=True)
class View:
    """Probabilities of a view's steps, and the smallest fraction of an image's area in a crop."""

    blur: float
    solarize: float
    min_area: float = 0.08
    flip: float = 0.5
    jitter: float = 0.8
    gray: float = 0.2


VIEWS = (View(blur=1.0, solarize=0.0), View(blur=0.1, solarize=0.2))  # of the reference program


def configured_views(config: DatasetConfig) -> tuple[View, ...]:
    """Return the first and the second view of ``dataset.views``."""
    views, flip = config.views, 0.5 if config.flip else 0.0
    return tuple(
        View(blur, solarize, views.min_area, flip, views.jitter, views.gray)
        for blur, solarize in zip(views.blur, views.solarize, strict=True)
    )


@dataclass(frozen=True)
class ViewDraws:
    """Random numbers of one image in each row; ``draws[a:b]`` is a part of the batch.

    ``whole`` is int32 [N, 13]: top, left, height and width of the crop in pixels; flip, 0 or 1; jitter, 0 or 1; its
    four steps in their order (0 brightness, 1 contrast, 2 saturation, 3 hue); hue, the shift of the hue in bytes,
    modulo 256; gray and solarize, 0 or 1. ``real`` is float32 [N, 4]: the factors of brightness, contrast and
    saturation, and the blur's sigma in pixels, at most 2.4, or 0 for no blur. ``views_cpu.cpp`` has the same columns.
    """

    whole: Tensor
    real: Tensor

    def __getitem__(self, part: slice) -> ViewDraws:
        return ViewDraws(self.whole[part], self.real[part])

    def to(self, device: torch.device | str) -> ViewDraws:
        return ViewDraws(*(to_device(table, torch.device(device)) for table in (self.whole, self.real)))

    def columns(self) -> dict[str, Tensor]:
        """Return the columns by name, each of shape [N]."""
        whole = zip(_WHOLE, self.whole.unbind(1), strict=True)
        return {**dict(whole), **dict(zip(_REAL, self.real.unbind(1), strict=True))}


def draw(generator: torch.Generator, n: int, side: int, view: View) -> ViewDraws:
    """Return ``n`` draws on CPU for images of ``side`` x ``side`` pixels, from a CPU ``generator``."""

    def chance(probability: float) -> Tensor:
        return torch.rand(n, generator=generator) < probability

    def factor(spread: float) -> Tensor:
        return torch.empty(n).uniform_(1 - spread, 1 + spread, generator=generator)

    height, width = _crop_sizes(generator, n, side, view.min_area)
    top, left = (_up_to(generator, side - length) for length in (height, width))
    order = torch.rand(n, 4, generator=generator).argsort(1)
    hue = torch.empty(n).uniform_(-_HUE, _HUE, generator=generator)
    sigma = torch.empty(n).uniform_(*_SIGMA, generator=generator)
    whole = [top, left, height, width, chance(view.flip), chance(view.jitter), *order.unbind(1)]
    whole += [(hue.double() * 255).int(), chance(view.gray), chance(view.solarize)]  # towards 0, as in torchvision
    real = [factor(_BRIGHTNESS), factor(_CONTRAST), factor(_SATURATION), sigma * chance(view.blur)]
    return ViewDraws(torch.stack([column.int() for column in whole], 1), torch.stack(real, 1))


def _crop_sizes(generator: torch.Generator, n: int, side: int, min_area: float) -> tuple[Tensor, Tensor]:
    """Return heights and widths [N]: the first of ten attempts that fits, else the whole image."""
    shape = (n, _TRIES)
    area = torch.empty(shape, dtype=torch.float64).uniform_(min_area, 1.0, generator=generator) * side**2
    ratio = torch.empty(shape, dtype=torch.float64).uniform_(*_LOG_RATIO, generator=generator).exp()
    height, width = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (height >= 1) & (height <= side) & (width >= 1) & (width <= side)
    first = fits.byte().argmax(1, keepdim=True)  # the first maximum
    height, width = (torch.where(fits, length, side).gather(1, first).squeeze(1) for length in (height, width))
    return height, width


def _up_to(generator: torch.Generator, last: Tensor) -> Tensor:
    """Return whole numbers [N], uniform in 0..last."""
    return (torch.rand(len(last), dtype=torch.float64, generator=generator) * (last + 1)).floor().minimum(last)
