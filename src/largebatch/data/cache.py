"""Files beside the data that keep decoded pixels, and the names of images that can't be read.

A file contains: the pixels of the training and of the test set, uint8 [N, C, S, S]; 1 to 8 zeros up to a multiple of
8; a JSON object with the labels and a description of the content; its length and CRC-32. The file is mapped, so that
the processes of a host share its pages.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from largebatch.config.datasets import DatasetConfig
from largebatch.data.encoded import relative_names
from largebatch.data.images import MemoryImages, Split
from largebatch.errors import UserError

_FORMAT = 2  # version of the files
_END = struct.Struct("<QQ")

Say = Callable[[str], None]
Block = tuple[NDArray[np.uint8], Tensor, list[str]]  # pixels [n, C, S, S], labels [n], files that can't be read
T = TypeVar("T")


class Stale(UserError):
    """A kept file is missing (empty message) or can't be used. The message follows its name in a sentence."""


@dataclass(frozen=True)
class Decoded:
    """Both splits in memory. ``unreadable``: the skipped images, relative to ``dataset.root``."""

    train: Split
    test: Split
    classes: tuple[str, ...]
    unreadable: tuple[str, ...]


def cache_path(config: DatasetConfig, channels: int, image_size: int) -> Path:
    return Path(config.root) / ".largebatch" / f"{config.name}-{channels}x{image_size}.pixels"


def fingerprint(root: str, paths: Sequence[str], settings: object) -> str:
    """Return hex digits that depend on ``settings`` (by repr) and on each file's path in ``root``, size and time."""
    lines = [repr((_FORMAT, settings))]
    for path, name in zip(paths, relative_names(paths, root), strict=True):
        try:
            stat = os.stat(path)
            lines.append(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}")
        except OSError:  # for example a broken link, which later counts as unreadable
            lines.append(f"{name}\0missing")
    return hashlib.blake2b("\n".join(lines).encode(errors="surrogateescape"), digest_size=16).hexdigest()


def kept(path: Path, read: Callable[[BinaryIO], T], write: Callable[[BinaryIO], None], doing: str, say: Say) -> T:
    """Return the result of ``read`` for the file at ``path``; if it raises ``Stale``, ``write`` makes the file first.

    One process writes and the others wait; a file appears whole or not at all. If no file can be kept (no permission,
    no space on the disk), ``say`` gets a line with the reason, and ``write`` writes to this process's memory. Each call
    of ``write`` must write the whole file.

    Args:
        doing: the work of ``write`` as the start of a sentence, for ``say``.

    Raises:
        UserError: from ``write``; or if the file that was just written isn't valid.
    """
    try:
        with suppress(Stale):
            return _read(path, read)
        with alone(path, say):
            try:
                return _read(path, read)  # another process may have written it meanwhile
            except Stale as stale:
                if str(stale):
                    say(f"{path} {stale}: it is written again")
            say(f"{doing}; later starts read the result from {path}")
            _write(path, write)
            return _read(path, read)
    except OSError as error:
        say(f"{doing} at every start, because it can't be kept in {path} ({error.strerror or error})")
    with _memory_file() as file:
        write(file)
        file.flush()
        return read(file)


def _read(path: Path, read: Callable[[BinaryIO], T]) -> T:
    try:
        with path.open("rb") as file:
            return read(file)
    except FileNotFoundError:
        raise Stale from None


@contextmanager
def alone(path: Path, say: Say) -> Iterator[None]:
    """Hold a lock that one process has at a time; the operating system releases it when the process ends."""
    import fcntl  # not on Windows

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # another process has the lock; the error depends on the system
            say(f"waiting for the process that is writing {path}")
            fcntl.lockf(handle, fcntl.LOCK_EX)
        yield


def _write(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write to a temporary file and rename it. Call under the lock."""
    for left_behind in path.parent.glob(f".{path.name}.*.tmp"):  # from a process that was killed
        left_behind.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:
            write(file)  # not synced, which takes seconds: the checksum detects what a crash of the machine leaves
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _memory_file() -> BinaryIO:
    if hasattr(os, "memfd_create"):
        return cast(BinaryIO, open(os.memfd_create("largebatch"), "w+b"))
    return cast(BinaryIO, tempfile.TemporaryFile())  # not Linux


def write_decoded(
    file: BinaryIO, fingerprint: str, classes: tuple[str, ...], train: Iterable[Block], test: Iterable[Block]
) -> None:
    """Write pixels block by block, so that at most one block is in memory."""
    unreadable: list[str] = []
    labels: list[list[int]] = []
    shape: tuple[int, ...] = ()
    for blocks in (train, test):
        labels.append([])
        for pixels, block_labels, left_out in blocks:
            file.write(np.ascontiguousarray(pixels).data)
            shape = pixels.shape[1:]
            labels[-1] += block_labels.tolist()
            unreadable += left_out
    file.write(bytes(8 - file.tell() % 8))  # at least one: an empty file can't be mapped
    file.flush()
    described = {
        "fingerprint": fingerprint,
        "shape": shape,
        "labels": labels,
        "classes": classes,
        "unreadable": unreadable,
        "checksum": _checksum(np.memmap(file, np.uint8, mode="r")),
    }
    text = json.dumps(described).encode()
    file.seek(0, os.SEEK_END)
    file.write(text + _END.pack(len(text), zlib.crc32(text)))


def read_decoded(file: BinaryIO, fingerprint: str) -> Decoded:
    """Return the splits of a file from ``write_decoded``. Their pixels are mapped; writes don't change the file.

    Raises:
        Stale: if the file isn't whole, or has another fingerprint.
    """
    if os.fstat(file.fileno()).st_size <= _END.size:
        raise Stale("is cut short")
    content = np.memmap(file, np.uint8, mode="c")
    length, crc = _END.unpack(content[-_END.size :].tobytes())
    body, text = content[: -length - _END.size], content[-length - _END.size : -_END.size].tobytes()
    if length == 0 or zlib.crc32(text) != crc:
        raise Stale("is damaged or cut short")
    described = json.loads(text)
    if described["fingerprint"] != fingerprint:
        raise Stale("was made from other files or settings")
    if len(body) % 8 or _checksum(body) != described["checksum"]:
        raise Stale("is damaged")
    train, test = (torch.tensor(labels, dtype=torch.int64) for labels in described["labels"])
    shape = (len(train) + len(test), *described["shape"])
    pixels = torch.from_numpy(body[: math.prod(shape)]).view(shape)
    return Decoded(
        Split(MemoryImages(pixels[: len(train)]), train),
        Split(MemoryImages(pixels[len(train) :]), test),
        tuple(described["classes"]),
        tuple(described["unreadable"]),
    )


def _checksum(content: NDArray[np.uint8]) -> int:
    """Return the sum of the 64-bit words: as fast as memory, and different after any changed or lost byte."""
    return int(content.view(np.int64).sum())
