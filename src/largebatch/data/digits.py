"""scikit-learn's digits: 1797 grey images of 8x8 pixels in 10 classes, without a download."""

from __future__ import annotations

import importlib.util
import zlib
from pathlib import Path

import numpy as np
import torch

from largebatch.config.datasets import DatasetConfig
from largebatch.data.cache import Say
from largebatch.data.images import MemoryImages, Split, resize
from largebatch.data.sampling import hold_out
from largebatch.errors import UserError

_TEST_SIZE = 360
_SPLIT_SEED = 0  # fixed: every run has the same test set


def load_digits(config: DatasetConfig, say: Say) -> tuple[Split, Split, tuple[str, ...]]:
    """Load a training set of 1437 and a test set of 360 images, stratified and equal for every seed.

    Pixels of 0..16 become 0..255 (``round(x * 255 / 16)``). The file is read without importing scikit-learn, in 0.02 s
    instead of 0.8 s.

    Raises:
        UserError: if scikit-learn's file is missing or damaged.
    """
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    try:
        table = np.loadtxt(path, delimiter=",")
        images = np.rint(table[:, :-1].reshape(-1, 1, 8, 8) * 255 / 16).astype(np.uint8)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"dataset=digits: can't read {path} ({error}); reinstall scikit-learn") from error
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    whole = Split(MemoryImages(resize(torch.from_numpy(images), config.image_size or 8)), labels)
    train, test = hold_out(labels, _TEST_SIZE, _SPLIT_SEED)
    return whole.select(train), whole.select(test), tuple(str(digit) for digit in range(10))
