"""The views of Barlow Twins in torch, for devices other than the CPU, and without a compiler (``views_cpu.cpp``).

The result is that of the per-image chain of torchvision's functions on PIL images at equal parameters. It has the same
fixed point arithmetic in int32 and the same rounding, no shape that depends on data and no host synchronisation. It has
no matrix product, so that autocast and TF32 don't change it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from largebatch.data.draws import BRIGHTNESS, CONTRAST, HUE, ViewDraws

_TAP_BITS, _BOX_BITS = 22, 24  # PIL's fixed point in resizing and in blurring


def viewed(images: Tensor, draws: ViewDraws) -> Tensor:
    """Return a view of each image, uint8 [N, C, S, S] to int32 in 0..255, on any device that has float64."""
    numbers = {name: column.view(-1, 1, 1, 1) for name, column in draws.columns().items()}
    images = _jitter(_resized_crop(images, numbers).float(), numbers)
    if images.shape[1] == 3:
        images = torch.where(numbers["gray"] > 0, _gray(images), images)
    images = _blur(images.int(), numbers["sigma"])
    return torch.where((numbers["solarize"] > 0) & (images >= 128), 255 - images, images)


def _resized_crop(images: Tensor, numbers: dict[str, Tensor]) -> Tensor:
    """Convert uint8 [N, C, S, S] to int32 in 0..255: crop, horizontal and then vertical bicubic pass, flip."""
    images = images.int()
    side = images.shape[-1]
    columns, weights = bicubic_taps(numbers["left"], numbers["width"], side)
    flip = numbers["flip"] > 0  # the last column first
    columns, weights = (torch.where(flip, taps.flip(2), taps) for taps in (columns, weights))
    images = _weigh(images, 3, columns.transpose(2, 3), weights.transpose(2, 3))
    return _weigh(images, 2, *bicubic_taps(numbers["top"], numbers["height"], side))


def _weigh(images: Tensor, axis: int, positions: Tensor, weights: Tensor) -> Tensor:
    """Return the sum along ``axis`` of the pixels at four ``positions`` times their ``weights``, to 8 bits.

    The four positions and weights are along the other axis, ``5 - axis``.
    """
    half = torch.full((), 1 << (_TAP_BITS - 1), dtype=torch.int32, device=images.device)
    fixed = half.expand(images.shape)
    for position, weight in zip(positions.chunk(4, 5 - axis), weights.chunk(4, 5 - axis), strict=True):
        fixed = fixed.addcmul(images.gather(axis, position.expand(images.shape)), weight)
    return (fixed >> _TAP_BITS).clamp_(0, 255)


def bicubic_taps(first: Tensor, size: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return the four source pixels of each of ``side`` pixels, int64 [N, 1, side, 4], and their weights, int32.

    ``first`` and ``size`` [N, 1, 1, 1]: the crop in the image, along one axis.
    """
    centre = (torch.arange(side, dtype=torch.float64, device=size.device).view(-1, 1) + 0.5) * _over(
        size.double(), side
    )
    low = (centre - 2 + 0.5).clamp(min=0).floor()
    high = torch.minimum((centre + 2 + 0.5).floor(), size)
    position = torch.arange(5, device=size.device) + low  # by rounding there may be a fifth, with weight 0
    distance = (position - centre + 0.5).abs()
    near = ((-0.5 + 2) * distance - (-0.5 + 3)) * distance * distance + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * -0.5
    weight = torch.where(distance < 1, near, torch.where(distance < 2, far, 0)) * (position < high)
    fixed = weight / weight.sum(3, keepdim=True) * (1 << _TAP_BITS)
    fixed = (fixed + torch.where(fixed < 0, -0.5, 0.5)).int()
    pixel = (first + position).clamp(max=side - 1).long()
    fifth = high - low > 4
    return torch.where(fifth, pixel[..., 1:], pixel[..., :4]), torch.where(fifth, fixed[..., 1:], fixed[..., :4])


def _jitter(images: Tensor, numbers: dict[str, Tensor]) -> Tensor:
    """Jitter the colours of float32 [N, C, S, S] with whole numbers in 0..255.

    The hue is the slowest step: it runs once for all images, after the steps before it and before the steps after it.
    """
    order = torch.cat([numbers[f"step{i}"] for i in range(4)], 1)  # [N, 4, 1, 1]
    hue_at = (order == HUE).int().argmax(1, keepdim=True)
    jittered = numbers["jitter"] > 0
    rank = torch.arange(3, device=order.device).view(1, 3, 1, 1)
    steps = order.gather(1, rank + (rank >= hue_at)).chunk(3, 1)  # the three others in their order
    for i, step in enumerate(steps):
        images = _blend_step(images, step, numbers, jittered & (i < hue_at))
    if images.shape[1] == 3:
        images = torch.where(jittered, _shift_hue(images, numbers["hue"]), images)
    for i, step in enumerate(steps):
        images = _blend_step(images, step, numbers, jittered & (i >= hue_at))
    return images


def _blend_step(images: Tensor, step: Tensor, numbers: dict[str, Tensor], on: Tensor) -> Tensor:
    """Change brightness, contrast or saturation, chosen by ``step`` [N, 1, 1, 1], of images whose ``on`` is True."""
    gray = _gray(images) if images.shape[1] == 3 else images
    mean = (_over(gray.sum((2, 3), dtype=torch.float64, keepdim=True), gray[0].numel()) + 0.5).floor().float()
    degenerate = torch.where(step == BRIGHTNESS, 0, torch.where(step == CONTRAST, mean, gray))
    contrast_or_saturation = torch.where(step == CONTRAST, numbers["contrast"], numbers["saturation"])
    factor = torch.where(step == BRIGHTNESS, numbers["brightness"], contrast_or_saturation)
    factor = torch.where(on, factor, 1)  # 1 doesn't change the image
    return (degenerate + factor * (images - degenerate)).clamp(0, 255).trunc()


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
