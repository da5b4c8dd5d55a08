"""``correct.npz``: the test images that a run classifies correctly, in the data set's order, 1 bit for each image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from largebatch.errors import UserError
from largebatch.runs.folder import readable, replace_file

Bits = NDArray[np.bool_]


def write_correct(path: Path, step: int, accuracy: float, correct: Bits) -> None:
    """Replace the bits of the last evaluation, and those of the best evaluation if this one is better.

    A resumed run continues with the file, and repeats evaluations that the file has already.

    Args:
        path: the file.
        step: optimizer step of the evaluation.
        accuracy: the accuracy that chooses the best evaluation; the earlier of equal ones.
        correct: bool [number of test images].
    """
    found = _content(path) if path.exists() else {}
    found |= {"images": len(correct), "last": np.packbits(correct)}
    if "best" not in found or accuracy > found["accuracy"] or step == found["step"]:
        found |= {"best": found["last"], "accuracy": accuracy, "step": step}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as new:
            np.savez(new, **found)

    replace_file(path, write)


def is_readable(path: Path) -> bool:
    """Return True if the file is there and whole."""
    try:
        with readable(path):
            read_correct(path)
    except (FileNotFoundError, UserError):
        return False
    return True


def read_correct(path: Path) -> dict[str, Bits]:
    """Return bool [number of test images] of the ``last`` and the ``best`` evaluation."""
    content = _content(path)
    return {name: np.unpackbits(content[name], count=int(content["images"])).astype(bool) for name in ("last", "best")}


def _content(path: Path) -> dict[str, Any]:
    """Return all arrays of the file. Reading an array checks its checksum."""
    with np.load(path) as file:
        return {name: file[name] for name in ("images", "last", "best", "accuracy", "step")}
