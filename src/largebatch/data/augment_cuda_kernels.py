# mypy: ignore-errors
# ruff: noqa: N803, N806 (capitals are compile-time constants, as in all triton programs)
"""The Triton kernels of ``augment_cuda.py``; importing this needs triton.

The arithmetic is that of ``augment_cpu.cpp`` and ``views_cpu.cpp``: fixed point, and single and double precision where
Pillow has them, so that the bits are equal. Launches therefore need ``enable_fp_fusion=False``.
"""

# No ``from __future__ import annotations``: triton's interpreter compares annotations with tl.constexpr itself.

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret  # its value when the decorators below read it

# Slices of a batch have any alignment. Without this option, triton would compile once for each.
_UNALIGNED = ["pixels", "indices", "whole", "real", "table"]


@triton.jit
def _image(pixels, indices, number, stride):
    """Return the address of the image at ``indices[number]``."""
    if indices is not None:
        number = tl.load(indices + number)
    return pixels + number * stride


@triton.jit
def _place(element, AREA: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr):
    """Return channel and pixel of an element of the result, in the order of memory."""
    if LAST:
        return element % CHANNELS, element // CHANNELS
    return element // AREA, element % AREA


@triton.jit
def _normalised(values, channel, mean, std):
    return tl.div_rn(values.to(tl.float32) - tl.load(mean + channel) * 255.0, tl.load(std + channel) * 255.0)


# -- crops, flips and rotations


@triton.jit(do_not_specialize=["stride", "padding"], do_not_specialize_on_alignment=_UNALIGNED)
def crops(
    pixels, indices, table, mean, std, out, stride, padding,
    SIDE: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write ``CHUNK`` elements of an augmented image. ``table`` is that of ``Draws``; None only normalises."""
    AREA: tl.constexpr = SIDE * SIDE
    PARTS: tl.constexpr = (AREA * CHANNELS + CHUNK - 1) // CHUNK
    number = (tl.program_id(0) // PARTS).to(tl.int64)
    element = tl.program_id(0) % PARTS * CHUNK + tl.arange(0, CHUNK)
    exists = element < AREA * CHANNELS
    channel, pixel = _place(tl.minimum(element, AREA * CHANNELS - 1), AREA, CHANNELS, LAST)
    inside = exists
    if table is not None:
        draw = table + number * 8
        top, left, flip = tl.load(draw) - padding, tl.load(draw + 1) - padding, tl.load(draw + 2)
        cos, sin, minus_sin = tl.load(draw + 3), tl.load(draw + 4), tl.load(draw + 5)
        down, across = pixel // SIDE, pixel % SIDE
        row = (tl.load(draw + 6) + cos * down + minus_sin * across) >> 16
        column = (tl.load(draw + 7) + sin * down + cos * across) >> 16
        # Only rows and columns that lie both in the crop and in the image are used, as in `augment._sources`.
        before = tl.where(flip != 0, left, -left)
        inside &= (row >= tl.maximum(-top, 0)) & (row < tl.minimum(SIDE - top, SIDE))
        inside &= (column >= tl.maximum(before, 0)) & (column < tl.minimum(SIDE + before, SIDE))
        pixel = (top + row) * SIDE + left + tl.where(flip != 0, SIDE - 1 - column, column)
    values = tl.load(_image(pixels, indices, number, stride) + channel * AREA + pixel, mask=inside, other=0)
    tl.store(out + number * (AREA * CHANNELS) + element, _normalised(values, channel, mean, std), mask=exists)


# -- views of Barlow Twins


@triton.jit(do_not_specialize=["stride"], do_not_specialize_on_alignment=_UNALIGNED)
def views(
    pixels, indices, whole, real, taps, mean, std, scratch, out, stride,
    SIDE: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr, CHUNK: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Make the view of one image, ``CHUNK`` pixels or ``LINES`` lines at a time.

    Pixels that meet other pixels pass through ``scratch``, uint8 [n, 2, CHANNELS, SIDE, SIDE], and stay in cache. One
    channel is treated as three equal ones: grayscale, saturation and hue then change nothing.

    ``taps`` is int32 [SIDE, 5, SIDE]: for each size of a crop, the first of four source pixels and the four weights of
    each pixel.
    """
    AREA: tl.constexpr = SIDE * SIDE
    PLANE: tl.constexpr = AREA if CHANNELS == 3 else 0
    number = tl.program_id(0).to(tl.int64)
    image = _image(pixels, indices, number, stride)
    first = scratch + number * (2 * CHANNELS * AREA)
    second = first + CHANNELS * AREA
    draw, factors = whole + number * 13, real + number * 4
    jitter, gray, sigma = tl.load(draw + 5), tl.load(draw + 11), tl.load(factors + 3)
    steps = tl.arange(0, 4)
    contrast_at = tl.sum(tl.where(tl.load(draw + 6 + steps) == 1, steps, 0))

    # The contrast needs the mean of the whole image, so the jitter is in two parts.
    total = tl.zeros([], tl.int64)
    for start in range(0, AREA, CHUNK):
        pixel = start + tl.arange(0, CHUNK)
        red, green, blue = _resized_crop(image, draw, taps, tl.minimum(pixel, AREA - 1), PLANE, SIDE)
        red, green, blue = _jittered(red, green, blue, draw, factors, 0, contrast_at * jitter, 0)
        total += tl.sum(tl.where(pixel < AREA, _gray(red, green, blue), 0)).to(tl.int64)
        _store(first, red, green, blue, pixel, PLANE, AREA)
    tl.debug_barrier()
    if jitter + gray > 0:
        mean_gray = (total.to(tl.float64) / AREA + 0.5).to(tl.int32)
        for start in range(0, AREA, CHUNK):
            pixel = start + tl.arange(0, CHUNK)
            red, green, blue = _load(first, pixel, PLANE, AREA)
            red, green, blue = _jittered(red, green, blue, draw, factors, contrast_at, 4 * jitter, mean_gray)
            if gray > 0:
                red = _gray(red, green, blue)
                green = red
                blue = red
            _store(first, red, green, blue, pixel, PLANE, AREA)
        tl.debug_barrier()
    if sigma > 0:
        inner, outer, wide = _box(sigma)
        _blur_lines(first, second, inner, outer, wide, SIDE, CHANNELS, LINES)
        tl.debug_barrier()
        _blur_lines(second, first, inner, outer, wide, SIDE, CHANNELS, LINES)
        tl.debug_barrier()
    solarize = tl.load(draw + 12)
    for start in range(0, CHANNELS * AREA, CHUNK):
        element = start + tl.arange(0, CHUNK)
        exists = element < CHANNELS * AREA
        channel, pixel = _place(tl.minimum(element, CHANNELS * AREA - 1), AREA, CHANNELS, LAST)
        values = tl.load(first + channel * AREA + pixel).to(tl.int32)
        values = tl.where((solarize != 0) & (values >= 128), 255 - values, values)
        tl.store(out + number * (CHANNELS * AREA) + element, _normalised(values, channel, mean, std), mask=exists)


@triton.jit
def _load(address, pixel, PLANE: tl.constexpr, AREA: tl.constexpr):
    address += tl.minimum(pixel, AREA - 1)
    red, green, blue = tl.load(address), tl.load(address + PLANE), tl.load(address + 2 * PLANE)
    return red.to(tl.int32), green.to(tl.int32), blue.to(tl.int32)


@triton.jit
def _store(address, red, green, blue, pixel, PLANE: tl.constexpr, AREA: tl.constexpr):
    inside = pixel < AREA
    tl.store(address + pixel, red.to(tl.uint8), mask=inside)
    if PLANE:
        tl.store(address + PLANE + pixel, green.to(tl.uint8), mask=inside)
        tl.store(address + 2 * PLANE + pixel, blue.to(tl.uint8), mask=inside)


# Resized crop: a horizontal and then a vertical bicubic pass, each rounded to 8 bits.


@triton.jit
def _resized_crop(image, draw, taps, pixel, PLANE: tl.constexpr, SIDE: tl.constexpr):
    top, left, height, width = tl.load(draw), tl.load(draw + 1), tl.load(draw + 2), tl.load(draw + 3)
    down, across = pixel // SIDE, pixel % SIDE
    across = tl.where(tl.load(draw + 4) != 0, SIDE - 1 - across, across)
    columns, across = _taps(taps, left, width, across, SIDE)
    rows, down = _taps(taps, top, height, down, SIDE)
    red = _resized(image, rows, columns, across, down, SIDE)
    green = red
    blue = red
    if PLANE:
        green = _resized(image + PLANE, rows, columns, across, down, SIDE)
        blue = _resized(image + 2 * PLANE, rows, columns, across, down, SIDE)
    return red, green, blue


@triton.jit
def _taps(taps, begin, size, place, SIDE: tl.constexpr):
    """Return four source pixels, and their weights in 1 / 2 ** 22. Pixels of weight 0 may lie beyond the end."""
    taps += (size - 1) * (5 * SIDE) + place
    first, last = begin + tl.load(taps), SIDE - 1
    places = (first, tl.minimum(first + 1, last), tl.minimum(first + 2, last), tl.minimum(first + 3, last))
    a, b, c, d = tl.load(taps + SIDE), tl.load(taps + 2 * SIDE), tl.load(taps + 3 * SIDE), tl.load(taps + 4 * SIDE)
    return places, (a, b, c, d)


@triton.jit
def _resized(plane, rows, columns, across, down, SIDE: tl.constexpr):
    fixed = down[0] * _weighed(plane + rows[0] * SIDE, columns, across)
    fixed += down[1] * _weighed(plane + rows[1] * SIDE, columns, across)
    fixed += down[2] * _weighed(plane + rows[2] * SIDE, columns, across)
    fixed += down[3] * _weighed(plane + rows[3] * SIDE, columns, across)
    return _to_byte(fixed)


@triton.jit
def _weighed(row, columns, across):
    fixed = across[0] * tl.load(row + columns[0]).to(tl.int32)
    fixed += across[1] * tl.load(row + columns[1]).to(tl.int32)
    fixed += across[2] * tl.load(row + columns[2]).to(tl.int32)
    fixed += across[3] * tl.load(row + columns[3]).to(tl.int32)
    return _to_byte(fixed)


@triton.jit
def _to_byte(fixed):
    return tl.minimum(tl.maximum((fixed + (1 << 21)) >> 22, 0), 255)


# Colours.


@triton.jit
def _jittered(red, green, blue, draw, factors, begin, end, mean):
    """Apply the steps of the colour jitter from ``begin`` to ``end``; ``mean`` is the mean gray before the contrast."""
    for i in range(begin, end):
        step = tl.load(draw + 6 + i)
        if step == 3:
            red, green, blue = _shifted_hue(red, green, blue, tl.load(draw + 10))
        elif step < 3:  # brightness, contrast or saturation; a hue that is off has step 4
            degenerate = tl.where(step == 2, _gray(red, green, blue), tl.where(step == 1, mean, 0))
            factor = tl.load(factors + step)
            red = _blended(degenerate, red, factor)
            green = _blended(degenerate, green, factor)
            blue = _blended(degenerate, blue, factor)
    return red, green, blue


@triton.jit
def _blended(degenerate, values, factor):
    blended = degenerate.to(tl.float32) + factor * (values - degenerate).to(tl.float32)
    return tl.minimum(tl.maximum(blended, 0.0), 255.0).to(tl.int32)


@triton.jit
def _gray(red, green, blue):
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


@triton.jit
def _shifted_hue(red, green, blue, shift):
    """Convert to HSV in bytes, add ``shift`` to the hue modulo 256, convert back."""
    high = tl.maximum(red, tl.maximum(green, blue))
    chroma = high - tl.minimum(red, tl.minimum(green, blue))
    divisor = tl.maximum(chroma, 1).to(tl.float32)
    from_red = tl.div_rn((high - red).to(tl.float32), divisor)
    from_green = tl.div_rn((high - green).to(tl.float32), divisor)
    from_blue = tl.div_rn((high - blue).to(tl.float32), divisor)
    second_third = (from_red.to(tl.float64) + 2.0 - from_blue.to(tl.float64)).to(tl.float32)
    last_third = (from_green.to(tl.float64) + 4.0 - from_red.to(tl.float64)).to(tl.float32)
    turn = tl.where(red == high, from_blue - from_green, tl.where(green == high, second_third, last_third))
    turn = turn.to(tl.float64) / 6.0 + 1.0
    turn = tl.where(turn >= 1.0, turn - 1.0, turn).to(tl.float32)
    hue = ((turn.to(tl.float64) * 255.0).to(tl.int32) + shift) & 255
    portion = tl.div_rn(chroma.to(tl.float32), tl.maximum(high, 1).to(tl.float32))
    saturation = (portion.to(tl.float64) * 255.0).to(tl.int32)

    sixth = hue * 6 // 255
    rest = tl.div_rn((hue * 6 - 255 * sixth).to(tl.float32), tl.full([], 255.0, tl.float32))
    portion = tl.div_rn(saturation.to(tl.float32), tl.full([], 255.0, tl.float32))
    falling = 1.0 - (portion * rest).to(tl.float64)
    rising = 1.0 - portion.to(tl.float64) * (1.0 - rest.to(tl.float64))
    value = high.to(tl.float64)
    middle = (value * tl.where(sixth % 2 == 1, falling, rising) + 0.5).to(tl.int32)
    low = (value * (1.0 - portion.to(tl.float64)) + 0.5).to(tl.int32)
    return (
        _channel(sixth, high, middle, low),
        _channel(sixth + 4, high, middle, low),
        _channel(sixth + 2, high, middle, low),
    )


@triton.jit
def _channel(place, high, middle, low):
    # By sixth of the circle, red is value, middle, low, low, middle, value; the other channels are thirds later.
    place = tl.where(place >= 6, place - 6, place)
    return tl.where((place == 0) | (place == 5), high, tl.where((place == 1) | (place == 4), middle, low))


# Gaussian blur: three boxes along each line.


@triton.jit
def _box(sigma):
    """Return the box of PIL's Gaussian blur: weights of inner and outer pixels, True for three inner ones."""
    variance = tl.div_rn(sigma * sigma, tl.full([], 3.0, tl.float32))
    length = tl.sqrt(12.0 * variance.to(tl.float64) + 1.0).to(tl.float32)
    whole = tl.floor((length.to(tl.float64) - 1.0) / 2.0).to(tl.float32)
    following = (whole + 1.0) * (whole + 1.0)
    part = tl.div_rn((2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance), 6.0 * (variance - following))
    radius = whole + part
    wide = radius >= 1.0
    inner = tl.div_rn(tl.full([], 16777216.0, tl.float32), radius * 2.0 + 1.0).to(tl.uint32)
    outer = (16777216 - tl.where(wide, 3, 1).to(tl.uint32) * inner) >> 1
    return inner, outer, wide


@triton.jit
def _boxed(a, b, c, d, e, inner, outer, wide):
    box = tl.where(wide, b + c + d, c)
    ends = tl.where(wide, a + e, b + d)
    return (box * inner + ends * outer + 8388608) >> 24


@triton.jit
def _appended(b, c, d, e, begins):
    """Return the last four inputs of a box after the input ``e``; the first input is repeated."""
    return tl.where(begins, e, b), tl.where(begins, e, c), tl.where(begins, e, d), e


@triton.jit
def _blur_lines(
    source, target, inner, outer, wide, SIDE: tl.constexpr, CHANNELS: tl.constexpr, LINES: tl.constexpr
):  # fmt: skip
    """Blur each line of [CHANNELS, SIDE, SIDE] along its pixels, and write it as a column.

    The three boxes follow each other along the line, each two pixels behind, with its last four inputs in registers.
    Before the first and after the last input of a box, that input is repeated.
    """
    for start in range(0, CHANNELS * SIDE, LINES):
        line = start + tl.arange(0, LINES)
        inside = line < CHANNELS * SIDE
        read = source + tl.minimum(line, CHANNELS * SIDE - 1) * SIDE
        write = target + line // SIDE * (SIDE * SIDE) + line % SIDE
        e0 = tl.load(read).to(tl.uint32)
        # Not e0: triton compares values before and after the loop's body to find what a loop changes, and would not
        # see d0 change if both began as the same value.
        zero = tl.zeros([LINES], tl.uint32)
        a0, b0, c0, d0 = zero, zero, zero, zero
        a1, b1, c1, d1 = zero, zero, zero, zero
        a2, b2, c2, d2 = zero, zero, zero, zero
        for i in range(SIDE + 6):
            coming = tl.load(read + tl.minimum(i + 1, SIDE - 1)).to(tl.uint32)
            e1 = tl.where(i < SIDE + 2, _boxed(a0, b0, c0, d0, e0, inner, outer, wide), d1)
            e2 = tl.where(i < SIDE + 4, _boxed(a1, b1, c1, d1, e1, inner, outer, wide), d2)
            e3 = _boxed(a2, b2, c2, d2, e2, inner, outer, wide)
            a0, b0, c0, d0 = _appended(b0, c0, d0, e0, i == 0)
            a1, b1, c1, d1 = _appended(b1, c1, d1, e1, i <= 2)
            a2, b2, c2, d2 = _appended(b2, c2, d2, e2, i <= 4)
            e0 = coming
            tl.store(write + (i - 6) * SIDE, e3.to(tl.uint8), mask=inside & (i >= 6))
