"""Data sets without a download: scikit-learn's digits, and random images for timing."""

from __future__ import annotations

import importlib.util
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from largebatch.config.datasets import DatasetConfig
from largebatch.data.cache import Say
from largebatch.data.images import MemoryImages, Split, resize
from largebatch.data.sampling import hold_out
from largebatch.errors import UserError
from largebatch.machine.memory import host_memory

_TEST_SIZE = 360  # of digits
_SEED = 0  # fixed: every run has the same test set of digits, and the same random images


def load_digits(config: DatasetConfig, say: Say) -> tuple[Split, Split, tuple[str, ...]]:
    """Load a training set of 1437 and a test set of 360 images, stratified and equal for every seed.

    They are grey, of 8x8 pixels, in 10 classes. Pixels of 0..16 become 0..255 (``round(x * 255 / 16)``).

    Raises:
        UserError: if scikit-learn's file is missing or damaged.
    """
    grey, digits = read_digits(config.name)
    pixels = torch.from_numpy(np.rint(grey[:, None] * 255 / 16).astype(np.uint8))
    labels = torch.from_numpy(digits)
    whole = Split(MemoryImages(resize(pixels, config.image_size or 8)), labels)
    train, test = hold_out(labels, _TEST_SIZE, _SEED)
    return whole.select(train), whole.select(test), tuple(str(digit) for digit in range(10))


def read_digits(dataset: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Read scikit-learn's digits: pixels of 0..16, [1797, 8, 8], and labels [1797].

    scikit-learn isn't imported: 0.02 s instead of 0.8 s.

    Raises:
        UserError: if the file is missing or damaged; it names ``dataset``.
    """
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    try:
        table = np.loadtxt(path, delimiter=",")
        return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"dataset={dataset}: can't read {path} ({error}); reinstall scikit-learn") from error


def load_synthetic(config: DatasetConfig, say: Say) -> tuple[Split, Split, tuple[str, ...]]:
    """Return uniformly random bytes with balanced labels in random order, equal for every run.

    Raises:
        UserError: if a size isn't set, or the images don't fit into memory.
    """
    train_size, test_size, num_classes, side = map(config.needed, config.needs)
    generator = torch.Generator().manual_seed(_SEED)
    size, free = (train_size + test_size) * config.channels * side**2, host_memory()
    if size > free:
        raise UserError(
            f"dataset.train_size={train_size}: these images need {size / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB "
            "of memory are free. Fix: fewer or smaller images (dataset.test_size, dataset.image_size)"
        )

    def random_split(n: int) -> Split:
        pixels = torch.randint(0, 256, (n, config.channels, side, side), dtype=torch.uint8, generator=generator)
        return Split(MemoryImages(pixels), torch.randperm(n, generator=generator) % num_classes)

    return random_split(train_size), random_split(test_size), tuple(str(label) for label in range(num_classes))
