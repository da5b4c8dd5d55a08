"""``largebatch predict``: class and probability of image files, as CSV."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from largebatch.config.imagefolder import image_files
from largebatch.errors import UserError
from largebatch.results.run import LoadedRun

_AT_ONCE = 256  # images


def predict(run: LoadedRun, images: Sequence[str], out: TextIO) -> int:
    """Write a line for each image that can be read: file, class and the class's probability.

    A file or folder that can't be read gets a line on stderr, and the others are predicted.

    Args:
        images: image files, and folders whose image files are taken, also in subfolders.

    Returns:
        The number of files and folders that can't be read.
    """
    network = run.model()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["file", "class", "probability"])
    unreadable: list[str] = []
    with torch.no_grad():
        decoded = _decoded(run, _files(images, unreadable), unreadable)
        while part := list(islice(decoded, _AT_ONCE)):
            logits = network(run.normalised(torch.stack([pixels for _, pixels in part]))).float()
            best = logits.softmax(dim=1).max(dim=1)
            for (name, _), probability, label in zip(part, best.values.tolist(), best.indices.tolist(), strict=True):
                writer.writerow([name, run.classes[label], f"{probability:.6f}"])
            out.flush()
    return len(unreadable)


def _files(images: Iterable[str], unreadable: list[str]) -> Iterator[str]:
    """Yield the files, and those of folders in the order of their names."""
    for image in images:
        if not Path(image).is_dir():
            yield image
            continue
        try:
            yield from image_files(Path(image), [])
        except (UserError, OSError) as error:
            _name(str(error), image, unreadable)


def _decoded(run: LoadedRun, files: Iterable[str], unreadable: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and pixels, uint8 [C, S, S], of the files that can be read."""
    for file in files:
        try:
            yield file, run.decoded(file)
        except UserError as error:
            _name(str(error), file, unreadable)


def _name(problem: str, image: str, unreadable: list[str]) -> None:
    print(f"error: {' '.join(problem.split())}", file=sys.stderr, flush=True)
    unreadable.append(image)
