"""Encoded images: files of their own, or rows of files that hold many (Arrow shards)."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import UnidentifiedImageError
from torch import Tensor

from largebatch.errors import UserError


class Row(NamedTuple):
    """Image in a file of many: the row's number, and the place of the image's bytes. ``size`` is -1 without any."""

    path: str
    number: int
    first: int
    size: int

    def __str__(self) -> str:
        return f"row {self.number} of {self.path}"


Source = str | Row  # path of an image file, or row


@dataclass(frozen=True)
class FileImages:
    """Image files of any size and mode; ``decode`` converts them to ``channels`` (1 or 3) and ``image_size`` pixels."""

    paths: tuple[str, ...]
    channels: int
    image_size: int

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def files(self) -> tuple[str, ...]:
        return self.paths

    def source(self, i: int) -> Source:
        return self.paths[i]

    def select(self, indices: Tensor) -> FileImages:
        return replace(self, paths=tuple(self.paths[i] for i in indices.tolist()))


@dataclass(frozen=True)
class RowImages:
    """Images of any size and mode in rows of ``files``, decoded as ``FileImages``.

    ``places``: int64 [N, 4], for each image the index of its file, and the last three fields of ``Row``.
    """

    files: tuple[str, ...]
    places: NDArray[np.int64]
    channels: int
    image_size: int

    def __len__(self) -> int:
        return len(self.places)

    def source(self, i: int) -> Source:
        file, *place = self.places[i].tolist()
        return Row(self.files[file], *place)

    def select(self, indices: Tensor) -> RowImages:
        return replace(self, places=self.places[indices.numpy()])


EncodedImages = FileImages | RowImages


def encoded(source: Source) -> bytes:
    """Return the bytes of an image file or a row.

    Raises:
        OSError, ValueError: if there are none.
    """
    path = source.path if isinstance(source, Row) else source
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is a pipe or device, not a file")  # opening it would wait for a writer
    if not isinstance(source, Row):
        return Path(path).read_bytes()
    if source.size < 0:
        raise ValueError("it has no bytes")
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), source.size, source.first)
    if len(data) < source.size:
        raise ValueError(f"{len(data):,} of its {source.size:,} bytes are there")
    return data


@contextmanager
def readable(source: Source) -> Iterator[None]:
    """Raise a ``UserError`` with the path or row if reading it as an image fails."""
    try:
        yield
    except Exception as error:  # damaged files make decoders raise anything, also MemoryError and RuntimeError
        unknown = isinstance(error, UnidentifiedImageError)  # whose text is an address in memory
        why = "its format is unknown" if unknown else str(error) or type(error).__name__
        raise UserError(
            f"{source} can't be read as an image ({why}): it is damaged or cut short; replace or remove it"
        ) from error


def relative_names(sources: Iterable[Source], root: str) -> list[str]:
    """Return the paths below ``root``; a row's name has its number too."""
    prefix = f"{Path(root)}{os.sep}"
    return [
        str(source._replace(path=source.path.removeprefix(prefix)))
        if isinstance(source, Row)
        else source.removeprefix(prefix)
        for source in sources
    ]
