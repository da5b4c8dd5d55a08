"""Deformed digits: 70,000 grey images of 16x16 pixels in 10 classes, made from scikit-learn's 1,797 digits.

Every machine makes the same bytes, and a checksum proves it. The computation uses only 32-bit additions, subtractions,
multiplications and comparisons, which IEEE 754 rounds in one way, and NumPy's ``RandomState``, whose numbers never
change. docs/deformed_digits.md has the alternatives that were tried.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import NDArray

from largebatch.config.datasets import DatasetConfig, DeformedDigits
from largebatch.data.builtin import read_digits
from largebatch.data.cache import Block, Say, kept, read_decoded, write_decoded
from largebatch.data.images import MemoryImages, Split, resize
from largebatch.errors import UserError

SIDE = 16
_SHA256 = "9b47b9296f4506910f361a86deeeb91908ddb90b85345b52223a22c0966e03c3"
_TRAIN_SOURCES = 1500
_TEST_SOURCES = 25  # per class
_BLOCK = 50  # sources at a time
_CLASSES = tuple(str(digit) for digit in range(10))

# The strength of the deformations; lengths are in pixels of 16x16 images.
_LINEAR = 0.2  # largest change of an element of the 2x2 matrix: rotation, shear and scale
_SHIFT = 1.0
_ELASTIC = 2.5  # largest displacement of a control point
_POINTS = 6  # control points per side, with quadratic splines between them
_THICKNESS = (0.2, 0.5)  # grey level at the edge of a stroke
_NEIGHBOUR = (9.0, 13.0)  # distance of a second digit's centre; part of it is in the image
_CONTRAST = 0.4  # least difference between strokes and background
_NOISE = 0.15  # largest change of a pixel, triangular

Floats = NDArray[np.float32]


def load_deformed_digits(config: DatasetConfig, say: Say) -> tuple[Split, Split, tuple[str, ...]]:
    """Load 60,000 training and 10,000 test images, equal for every seed and on every machine.

    1,500 sources have 40 training images each, in succession; 250 other sources have 40 test images each. The first
    call takes a few seconds and keeps the images below ``config.root``.

    Raises:
        UserError: if scikit-learn's file is missing or damaged, or if the images are wrong.
    """

    def write(file: BinaryIO) -> None:
        grey, labels = read_digits(config.name)
        sources = (grey / 16).astype(np.float32)
        order = RandomState(0).permutation(len(labels))
        test = np.concatenate([order[labels[order] == label][:_TEST_SOURCES] for label in range(len(_CLASSES))])
        train = order[~np.isin(order, test)][:_TRAIN_SOURCES]
        digest = hashlib.sha256()
        parts = [(train, RandomState(1)), (test, RandomState(2))]
        blocks = (_blocks(sources[part], labels[part], random, digest) for part, random in parts)
        write_decoded(file, _SHA256, _CLASSES, *blocks)
        if digest.hexdigest() != _SHA256:
            raise UserError(
                f"dataset=deformed_digits: the images made here have the SHA-256 {digest.hexdigest()} instead of "
                f"{_SHA256}, so results couldn't be compared. Fix: reinstall scikit-learn and numpy"
            )

    path = Path(config.root) / ".largebatch" / f"{config.name}.pixels"
    made = kept(path, lambda file: read_decoded(file, _SHA256), write, f"making {config.name}", say)
    return _resized(made.train, config), _resized(made.test, config), made.classes


def _resized(split: Split, config: DatasetConfig) -> Split:
    assert isinstance(split.images, MemoryImages)
    return Split(MemoryImages(resize(split.images.pixels, config.image_size or SIDE)), split.labels)


def _blocks(sources: Floats, labels: NDArray[np.int64], random: RandomState, digest: hashlib._Hash) -> Iterator[Block]:
    """Yield the images of successive sources, and add pixels and labels to ``digest``."""
    for first in range(0, len(sources), _BLOCK):
        chosen = np.repeat(np.arange(first, min(first + _BLOCK, len(sources))), DeformedDigits.copies)
        pixels, chosen_labels = deformed(sources, chosen, random), labels[chosen]
        digest.update(pixels.tobytes())
        digest.update(chosen_labels.astype("<i8").tobytes())
        yield pixels[:, None], torch.from_numpy(chosen_labels), []


def deformed(sources: Floats, chosen: NDArray[np.int64], random: RandomState) -> NDArray[np.uint8]:
    """Return a deformed image, uint8 [n, 16, 16], of each of the ``chosen`` sources [n].

    A random linear map, a shift and smooth elastic displacements move the pixels. A second digit, of any source, stands
    beside the first, and part of it is in the image. Strokes have a random thickness and contrast, are light or dark,
    and have noise.

    Args:
        sources: images in 0..1, [N, 8, 8].
    """
    n = len(chosen)

    def uniform(low: float, high: float, rows: int = 1, columns: int = 1) -> Floats:
        numbers = random.random_sample((n, rows, columns)).astype(np.float32)
        return np.float32(low) + np.float32(high - low) * numbers

    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32) - np.float32((SIDE - 1) / 2)
    matrix = [uniform(-_LINEAR, _LINEAR) for _ in range(4)]
    place_y = y + matrix[0] * y + matrix[1] * x + _elastic(uniform(-_ELASTIC, _ELASTIC, _POINTS, _POINTS))
    place_x = x + matrix[2] * y + matrix[3] * x + _elastic(uniform(-_ELASTIC, _ELASTIC, _POINTS, _POINTS))

    beside, along = uniform(*_NEIGHBOUR) * _sign(random, n), uniform(-SIDE / 2, SIDE / 2)
    horizontal = _sign(random, n) > 0
    neighbour = random.randint(0, len(sources), n)
    edge = uniform(*_THICKNESS)
    image = np.maximum(
        _strokes(sources[chosen], place_y + uniform(-_SHIFT, _SHIFT), place_x + uniform(-_SHIFT, _SHIFT), edge),
        _strokes(
            sources[neighbour],
            place_y + np.where(horizontal, along, beside),
            place_x + np.where(horizontal, beside, along),
            edge,
        ),
    )

    contrast = uniform(_CONTRAST, 1)
    image = uniform(0, 1) * (1 - contrast) + contrast * image
    image = np.where(_sign(random, n) > 0, image, 1 - image)
    image += np.float32(_NOISE) * (uniform(0, 1, SIDE, SIDE) - uniform(0, 1, SIDE, SIDE))
    return _clip(image * np.float32(255), 0, 255).astype(np.uint8)


def _sign(random: RandomState, n: int) -> Floats:
    """Return -1 or 1 with equal probability, [n, 1, 1]."""
    return (random.randint(0, 2, (n, 1, 1)) * 2 - 1).astype(np.float32)


def _elastic(points: Floats) -> Floats:
    """Interpolate displacements of control points [n, K, K] with quadratic B-splines, [n, 16, 16]."""
    weights = _spline_weights()
    rows = np.zeros((len(points), SIDE, _POINTS), np.float32)
    field = np.zeros((len(points), SIDE, SIDE), np.float32)
    for k in range(_POINTS):
        rows += weights[:, k, None] * points[:, k, None, :]
    for k in range(_POINTS):
        field += weights[None, :, k] * rows[:, :, k, None]
    return field


def _spline_weights() -> Floats:
    """Return each control point's weight at each pixel of a side, [16, K]."""
    weights = np.zeros((SIDE, _POINTS), np.float32)
    for pixel in range(SIDE):
        place = (pixel + 0.5) * (_POINTS - 2) / SIDE
        first = int(place)
        part = place - first
        weights[pixel, first : first + 3] = (1 - part) * (1 - part) / 2, 0.5 + part - part * part, part * part / 2
    return weights


def _strokes(sources: Floats, rows: Floats, columns: Floats, edge: Floats) -> Floats:
    """Sample ``sources`` [n, 8, 8] at positions of 16x16 pixels around the centre, in 0..1 with sharpened edges."""
    padded = np.pad(sources, ((0, 0), (2, 2), (2, 2)))  # zeros, so that places outside can move to the border
    size = padded.shape[1]
    half, first = np.float32(0.5), np.float32(5.5)
    rows, columns = _clip(rows * half + first, 0.5, size - 1.5), _clip(columns * half + first, 0.5, size - 1.5)
    row, column = rows.astype(np.int32), columns.astype(np.int32)
    down, right = rows - row.astype(np.float32), columns - column.astype(np.float32)
    corner = (np.arange(len(sources))[:, None, None] * size + row) * size + column
    values = padded.reshape(-1)
    upper = values[corner] + (values[corner + 1] - values[corner]) * right
    lower = values[corner + size] + (values[corner + size + 1] - values[corner + size]) * right
    grey = upper + (lower - upper) * down
    return _clip((grey - edge) * np.float32(2) + half, 0, 1)


def _clip(values: Floats, least: float, most: float) -> Floats:
    return np.minimum(np.maximum(values, np.float32(least)), np.float32(most))
