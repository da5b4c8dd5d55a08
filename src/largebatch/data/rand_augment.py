"""RandAugment, as torchvision's ``RandAugment`` on PIL images: its 14 operations, nearest pixels, black outside.

The images of a batch that have the same operation are treated together, so each image pays only for its own. The choice
of operations stays on the CPU, and a GPU doesn't wait. The arithmetic is PIL's, and the pixels are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from largebatch.config.augmentation import RandAugmentConfig
from largebatch.data.draws import fixed_rotation
from largebatch.data.stream import to_device
from largebatch.data.views import blended, gray_of, mean_gray

_BINS = 31  # of magnitudes
_ONE = 1 << 16  # PIL's affine transform counts in 1/65536 of a pixel
_AT_ONCE = 1 << 26  # numbers that are treated together


@dataclass(frozen=True)
class OpDraws:
    """Operations of one image in each row; ``draws[a:b]`` is a part of the batch.

    ``kinds`` is int64 [N, operations], the place in ``OPERATIONS``. ``negative`` is bool [N, operations], True for the
    negative magnitude. Both stay on the CPU. ``magnitude`` is that of ``RandAugmentConfig``.
    """

    magnitude: int
    kinds: Tensor
    negative: Tensor

    def __getitem__(self, part: slice) -> OpDraws:
        return replace(self, kinds=self.kinds[part], negative=self.negative[part])

    def to(self, device: torch.device | str) -> OpDraws:
        return self


def draw_operations(generator: torch.Generator, n: int, config: RandAugmentConfig) -> OpDraws:
    """Return ``n`` draws: operations with equal probability, and signs with probability 0.5."""
    kinds = torch.randint(len(OPERATIONS), (n, config.operations), generator=generator)
    negative = torch.rand((n, config.operations), generator=generator) < 0.5
    return OpDraws(config.magnitude, kinds, negative)


def operated(images: Tensor, draws: OpDraws) -> Tensor:
    """Apply the operations to images, uint8 [N, C, S, S], in place, and return the images. C is 1 or 3."""
    at_once = max(_AT_ONCE // max(images[:1].numel(), 1), 1)
    for kinds, negative in zip(draws.kinds.unbind(1), draws.negative.unbind(1), strict=True):
        for kind, (_, magnitudes, operation) in enumerate(OPERATIONS):
            magnitude = magnitudes(images.shape[-1])[draws.magnitude]
            for sign in (1.0, -1.0) if kind in _SIGNED else (1.0,):
                chosen = kinds == kind
                if kind in _SIGNED:
                    chosen &= negative == (sign < 0)
                for some in torch.split(chosen.nonzero().flatten(), at_once):
                    if len(some):
                        where = to_device(some, images.device)
                        images[where] = operation(images[where], sign * magnitude).to(torch.uint8)
    return images


def _up_to(last: float) -> Callable[[int], list[float]]:
    return lambda side: torch.linspace(0.0, last, _BINS).tolist()


def _translations(side: int) -> list[float]:
    return torch.linspace(0.0, 150.0 / 331.0 * side, _BINS).tolist()


def _bits(side: int) -> list[float]:
    return (8 - (torch.arange(_BINS) / ((_BINS - 1) / 4)).round()).tolist()


def _thresholds(side: int) -> list[float]:
    return torch.linspace(255.0, 0.0, _BINS).tolist()


def _nothing(side: int) -> list[float]:
    return [0.0] * _BINS


def _identity(images: Tensor, magnitude: float) -> Tensor:
    return images


def _moved(images: Tensor, column: tuple[int, int, int], row: tuple[int, int, int]) -> Tensor:
    """Return the pixels at a source column and row, each in 1/65536 as a base and its growth across and down."""
    side = images.shape[-1]
    across = torch.arange(side, dtype=torch.int32, device=images.device)
    down = across[:, None]
    columns, rows = ((base + right * across + below * down) >> 16 for base, right, below in (column, row))
    inside = (columns >= 0) & (columns < side) & (rows >= 0) & (rows < side)
    source = ((rows * side + columns) * inside).flatten().long()
    return (images.flatten(2)[:, :, source] * inside.flatten()).view_as(images)


def _fixed(number: float) -> int:
    return math.floor(number * _ONE + 0.5)


def _shear_x(images: Tensor, magnitude: float) -> Tensor:
    tan = math.tan(math.radians(math.degrees(math.atan(magnitude))))
    return _moved(images, (_fixed(0.5 + tan * 0.5), _ONE, _fixed(tan)), (_ONE // 2, 0, _ONE))


def _shear_y(images: Tensor, magnitude: float) -> Tensor:
    tan = math.tan(math.radians(math.degrees(math.atan(magnitude))))
    return _moved(images, (_ONE // 2, _ONE, 0), (_fixed(0.5 + tan * 0.5), _fixed(tan), _ONE))


def _translate_x(images: Tensor, magnitude: float) -> Tensor:
    return _moved(images, (_ONE // 2 - int(magnitude) * _ONE, _ONE, 0), (_ONE // 2, 0, _ONE))


def _translate_y(images: Tensor, magnitude: float) -> Tensor:
    return _moved(images, (_ONE // 2, _ONE, 0), (_ONE // 2 - int(magnitude) * _ONE, 0, _ONE))


def _rotate(images: Tensor, magnitude: float) -> Tensor:
    angle = torch.tensor([magnitude], dtype=torch.float64)
    cos, sin, minus_sin, first_row, first_column = map(int, fixed_rotation(angle, images.shape[-1]).flatten().tolist())
    return _moved(images, (first_column, cos, sin), (first_row, minus_sin, cos))


def _brightness(images: Tensor, magnitude: float) -> Tensor:
    return blended(0, images, 1.0 + magnitude)


def _color(images: Tensor, magnitude: float) -> Tensor:
    return blended(gray_of(images.float()), images, 1.0 + magnitude)


def _contrast(images: Tensor, magnitude: float) -> Tensor:
    return blended(mean_gray(gray_of(images.float())), images, 1.0 + magnitude)


def _sharpness(images: Tensor, magnitude: float) -> Tensor:
    """Blend with a smoothed image: weights 5 and 1 of 13. Pixels at the edge stay."""
    smooth, whole = images.int(), images.int()
    side = images.shape[-1]
    if side > 2:
        total = 4 * whole[:, :, 1:-1, 1:-1]
        for top in range(3):
            for left in range(3):
                total = total + whole[:, :, top : top + side - 2, left : left + side - 2]
        smooth = smooth.clone()
        smooth[:, :, 1:-1, 1:-1] = (2 * total + 13) // 26
    return blended(smooth, images, 1.0 + magnitude)


def _posterize(images: Tensor, magnitude: float) -> Tensor:
    return images & (0xFF & ~((1 << (8 - int(magnitude))) - 1))


def _solarize(images: Tensor, magnitude: float) -> Tensor:
    return torch.where(images < magnitude, images, 255 - images)


def _autocontrast(images: Tensor, magnitude: float) -> Tensor:
    """Stretch each channel from its darkest and brightest pixel to 0 and 255."""
    low, high = (end.double() for end in (images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)))
    scale = torch.full_like(high, 255) / (high - low).clamp(min=1)
    stretched = (images * scale + -low * scale).trunc().clamp(0, 255)
    return torch.where(high > low, stretched, images.double())


def _equalize(images: Tensor, magnitude: float) -> Tensor:
    """Give all levels of a channel the same number of pixels."""
    planes = images.flatten(2).flatten(0, 1).long()  # [N * C, S * S]
    counts = torch.zeros(len(planes), 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(1, planes, torch.ones_like(planes))
    last = counts.gather(1, planes.amax(1, keepdim=True))
    step = (planes.shape[1] - last) // 255
    before = counts.cumsum(1) - counts
    table = ((before + step // 2) // step.clamp(min=1)).clamp(max=255)
    equal = torch.where(step > 0, table.gather(1, planes), planes)
    return equal.view_as(images)


# Names as in torchvision, magnitudes of the bins for images of so many pixels, and functions of images and magnitude.
OPERATIONS: tuple[tuple[str, Callable[[int], list[float]], Callable[[Tensor, float], Tensor]], ...] = (
    ("Identity", _nothing, _identity),
    ("ShearX", _up_to(0.3), _shear_x),
    ("ShearY", _up_to(0.3), _shear_y),
    ("TranslateX", _translations, _translate_x),
    ("TranslateY", _translations, _translate_y),
    ("Rotate", _up_to(30.0), _rotate),
    ("Brightness", _up_to(0.9), _brightness),
    ("Color", _up_to(0.9), _color),
    ("Contrast", _up_to(0.9), _contrast),
    ("Sharpness", _up_to(0.9), _sharpness),
    ("Posterize", _bits, _posterize),
    ("Solarize", _thresholds, _solarize),
    ("AutoContrast", _nothing, _autocontrast),
    ("Equalize", _nothing, _equalize),
)
_SIGNED = range(1, 10)
