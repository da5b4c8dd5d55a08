"""Random resized crops and the views of Barlow Twins in torch, for all devices and sizes.

The kernels (``views_cpu.cpp`` and others) make images of the side that they are cropped from. Smaller images, and
machines without a kernel, use this code.

The result is that of the per-image chain of torchvision's functions on PIL images at equal parameters. It has the same
fixed point arithmetic in int32 and the same rounding, no shape that depends on data and no host synchronisation. It has
no matrix product, so that autocast and TF32 don't change it.
"""

from __future__ import annotations

import functools
import math
import operator

import torch
from torch import Tensor

from largebatch.data.draws import BRIGHTNESS, CONTRAST, HUE, NO_STEP, ViewDraws

_TAP_BITS, _BOX_BITS = 22, 24  # PIL's fixed point in resizing and in blurring
_SUPPORT = {"bicubic": 2, "bilinear": 1}  # reach of the interpolation in pixels


def viewed(images: Tensor, draws: ViewDraws) -> Tensor:
    """Convert uint8 [N, C, R, R] to a view of each image, int32 [N, C, S, S] in 0..255, with S = ``draws.side``.

    The device must have float64.
    """
    numbers = {name: column.view(-1, 1, 1, 1) for name, column in draws.columns().items()}
    images = _jitter(_resized_crop(images, numbers, draws.side, draws.interpolation).float(), numbers)
    if images.shape[1] == 3:
        images = torch.where(numbers["gray"] > 0, _gray(images), images)
    images = _blur(images.int(), numbers["sigma"])
    return torch.where((numbers["solarize"] > 0) & (images >= 128), 255 - images, images)


def _resized_crop(images: Tensor, numbers: dict[str, Tensor], side: int, interpolation: str) -> Tensor:
    """Convert uint8 [N, C, R, R] to int32 [N, C, side, side] in 0..255: crop, a pass along rows, along columns, flip.

    A crop whose height shrinks by more than twice the pixels of its width has the passes in the other order, as in
    Pillow 13.
    """
    images, image_side = images.int(), images.shape[-1]
    along_rows, along_columns = (numbers["left"], numbers["width"]), (numbers["top"], numbers["height"])
    other_order = None
    if image_side > side:
        other_order = numbers["height"] - side > 2 * (numbers["width"] - side).clamp(min=0)
        images = torch.where(other_order, images.mT, images)
        both = zip(along_rows, along_columns, strict=True)
        swapped = [(torch.where(other_order, b, a), torch.where(other_order, a, b)) for a, b in both]
        along_rows, along_columns = zip(*swapped, strict=True)
    columns, weights = taps(*along_rows, side, image_side, interpolation)
    images = _weigh(images, 3, columns.transpose(2, 3), weights.transpose(2, 3))
    images = _weigh(images, 2, *taps(*along_columns, side, image_side, interpolation))
    if other_order is not None:
        images = torch.where(other_order, images.mT, images)
    return torch.where(numbers["flip"] > 0, images.flip(3), images)


def _weigh(images: Tensor, axis: int, positions: Tensor, weights: Tensor) -> Tensor:
    """Return the sum along ``axis`` of the pixels at the ``positions`` times their ``weights``, to 8 bits.

    The positions and weights of a pixel are along the other axis, ``5 - axis``.
    """
    count, shape = positions.shape[5 - axis], list(images.shape)
    shape[axis] = positions.shape[axis]
    half = torch.full((), 1 << (_TAP_BITS - 1), dtype=torch.int32, device=images.device)
    fixed = half.expand(shape)
    for position, weight in zip(positions.chunk(count, 5 - axis), weights.chunk(count, 5 - axis), strict=True):
        fixed = fixed.addcmul(images.gather(axis, position.expand(shape)), weight)
    return (fixed >> _TAP_BITS).clamp_(0, 255)


def taps(first: Tensor, size: Tensor, side: int, image_side: int, interpolation: str) -> tuple[Tensor, Tensor]:
    """Return the K source pixels of each of ``side`` pixels, int64 [N, 1, side, K], and their weights, int32.

    The interpolation is antialiased, as PIL's. K is 4 for images of ``side`` pixels, and larger for larger images.

    Args:
        first, size: [N, 1, 1, 1], the crop in the image along one axis.
        image_side: side of the image in pixels.
        interpolation: ``bicubic`` or ``bilinear``.
    """
    reach = _SUPPORT[interpolation]
    scale = _over(size.double(), side)
    wider = scale.clamp(min=1)  # antialiasing of a crop that shrinks
    centre = (torch.arange(side, dtype=torch.float64, device=size.device).view(-1, 1) + 0.5) * scale
    low = (centre - reach * wider + 0.5).clamp(min=0).floor()
    high = torch.minimum((centre + reach * wider + 0.5).floor(), size)
    # By rounding there may be a fifth for images of `side` pixels, with weight 0.
    count = 5 if image_side <= side else math.ceil(reach * image_side / side) * 2 + 1
    position = torch.arange(count, device=size.device) + low
    weight = _weight((position - centre + 0.5) * wider.reciprocal(), interpolation) * (position < high)
    fixed = weight / functools.reduce(operator.add, torch.split(weight, 1, 3)) * (1 << _TAP_BITS)
    fixed = (fixed + torch.where(fixed < 0, -0.5, 0.5)).int()
    pixel = (first + position).clamp(max=image_side - 1).long()
    if image_side > side:
        return pixel, fixed
    fifth = high - low > 4
    return torch.where(fifth, pixel[..., 1:], pixel[..., :4]), torch.where(fifth, fixed[..., 1:], fixed[..., :4])


def _weight(distance: Tensor, interpolation: str) -> Tensor:
    """Return the weight of a pixel at ``distance`` from the centre, float64, not yet divided by the sum of weights."""
    distance = distance.abs()
    if interpolation == "bilinear":
        return (1 - distance).clamp(min=0)
    near = ((-0.5 + 2) * distance - (-0.5 + 3)) * distance * distance + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * -0.5
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0))


def _jitter(images: Tensor, numbers: dict[str, Tensor]) -> Tensor:
    """Jitter the colours of float32 [N, C, S, S] with whole numbers in 0..255.

    The hue is the slowest step: it runs once for all images, after the steps before it and before the steps after it.
    """
    order = torch.cat([numbers[f"step{i}"] for i in range(4)], 1)  # [N, 4, 1, 1]
    hue_at = (order >= HUE).int().argmax(1, keepdim=True)  # or NO_STEP in its place
    jittered, shifted = numbers["jitter"] > 0, (order == HUE).any(1, keepdim=True)
    rank = torch.arange(3, device=order.device).view(1, 3, 1, 1)
    steps = order.gather(1, rank + (rank >= hue_at)).chunk(3, 1)  # the three others in their order
    for i, step in enumerate(steps):
        images = _blend_step(images, step, numbers, jittered & (i < hue_at))
    if images.shape[1] == 3:
        images = torch.where(jittered & shifted, _shift_hue(images, numbers["hue"]), images)
    for i, step in enumerate(steps):
        images = _blend_step(images, step, numbers, jittered & (i >= hue_at))
    return images


def _blend_step(images: Tensor, step: Tensor, numbers: dict[str, Tensor], on: Tensor) -> Tensor:
    """Change brightness, contrast or saturation, chosen by ``step`` [N, 1, 1, 1], of images whose ``on`` is True."""
    gray = gray_of(images)
    degenerate = torch.where(step == BRIGHTNESS, 0, torch.where(step == CONTRAST, mean_gray(gray), gray))
    contrast_or_saturation = torch.where(step == CONTRAST, numbers["contrast"], numbers["saturation"])
    factor = torch.where(step == BRIGHTNESS, numbers["brightness"], contrast_or_saturation)
    factor = torch.where(on & (step != NO_STEP), factor, 1)  # 1 doesn't change the image
    return blended(degenerate, images, factor)


def blended(degenerate: Tensor | float, images: Tensor, factor: Tensor | float) -> Tensor:
    """Return float32 whole numbers in 0..255: ``degenerate`` for a factor of 0, the images for 1, or beyond."""
    images = images.float()
    return (degenerate + factor * (images - degenerate)).clamp(0, 255).trunc()


def gray_of(images: Tensor) -> Tensor:
    """Return the gray of float32 images [N, C, S, S] with whole numbers in 0..255, [N, 1, S, S]. C is 1 or 3."""
    return _gray(images) if images.shape[1] == 3 else images


def mean_gray(gray: Tensor) -> Tensor:
    """Return the rounded mean of each image, float32 [N, 1, 1, 1]."""
    return (_over(gray.sum((2, 3), dtype=torch.float64, keepdim=True), gray[0].numel()) + 0.5).floor().float()


def _gray(images: Tensor) -> Tensor:
    red, green, blue = images.chunk(3, 1)
    return ((19595 * red + 38470 * green + 7471 * blue + (1 << 15)) / (1 << 16)).floor()  # exact: below 2 ** 24


def _shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Convert to HSV in bytes, add ``shift`` to the hue modulo 256, convert back; fp32 and fp64 as in PIL."""
    red, green = images[:, :1], images[:, 1:2]
    value = images.amax(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    from_red, from_green, from_blue = ((value - images) / chroma.clamp(min=1)).double().chunk(3, 1)
    turn = torch.where(green == value, 2 + from_red - from_blue, 4 + from_green - from_red)
    turn = torch.where(red == value, from_blue - from_green, turn).float()
    turn = _over(turn.double(), 6) + 1
    hue = ((turn - turn.floor()).float().double() * 255).int()
    saturation = _over(((chroma / value.clamp(min=1)).double() * 255).floor().float(), 255)

    sixths = ((hue + shift) & 255) * 6
    sixth = sixths // 255
    rest = _over((sixths - 255 * sixth).float(), 255)
    falls, rises = (saturation * rest).double(), saturation.double() * (1 - rest.double())
    parts = torch.where(sixth % 2 == 1, falls, rises)
    middle, low = ((value.double() * (1 - part) + 0.5).floor().float() for part in (parts, saturation.double()))
    # Red is value, middle or low, by sixth of the circle. Green follows a third of the circle later, then blue.
    place = (sixth + torch.arange(0, 12, 4, device=images.device).view(3, 1, 1)) % 6
    return torch.where((place == 0) | (place == 5), value, torch.where((place == 1) | (place == 4), middle, low))


def _blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur int32 [N, C, S, S] in 0..255 as PIL: three box blurs along the rows, then three along the columns.

    A box is 1 or 3 pixels of weight ``inner`` between two pixels of weight ``outer``. 128 is subtracted from pixels, so
    that 24 bits of a weight and 8 of a pixel fit into int32; a sigma of 0 doesn't change pixels.
    """
    inner, outer, wide = _box(sigma)
    # 1 minus the sum of weights (by the rounding of `outer`), times the 128 that was subtracted.
    half = (1 << (_BOX_BITS - 1)) - 128 * ((1 << _BOX_BITS) - torch.where(wide, 3, 1) * inner - 2 * outer)
    by_distance = (inner, torch.where(wide, inner, outer), torch.where(wide, outer, 0))
    side = images.shape[-1]
    images = images - 128
    for axis in (3, 3, 3, 2, 2, 2):
        first, last = images.narrow(axis, 0, 1), images.narrow(axis, side - 1, 1)
        row = torch.cat([first, first, images, last, last], axis)
        a, b, c, d, e = (row.narrow(axis, start, side) for start in range(5))
        images = (a + e).mul_(by_distance[2]).addcmul_(b + d, by_distance[1]).addcmul_(c, by_distance[0])
        images = images.add_(half).bitwise_right_shift_(_BOX_BITS)
    return images + 128


def _box(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the box of PIL's Gaussian blur: int32 weights of inner and outer pixels, True for three inner ones."""
    variance = _over(sigma * sigma, 3)
    length = (12 * variance.double() + 1).sqrt().float()
    whole = ((length.double() - 1) / 2).floor().float()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) * (whole + 1)))
    radius = whole + part
    wide = radius >= 1
    inner = ((radius * 2 + 1).reciprocal() * (1 << _BOX_BITS)).int()
    outer = ((1 << _BOX_BITS) - torch.where(wide, 3, 1) * inner) >> 1
    return inner, outer, wide


def _over(numbers: Tensor, divisor: float) -> Tensor:
    """Return the quotient, rounded once. For a Python number, CUDA would round its reciprocal too."""
    return numbers / torch.full((), divisor, dtype=numbers.dtype, device=numbers.device)
