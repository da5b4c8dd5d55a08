"""Files beside the data that keep slow results: decoded pixels, and the list of images that can't be read.

A file of pixels contains: the magic bytes; the pixels of the training and of the test set, uint8 [N, C, S, S]; zeros up
to a multiple of 8; their labels, int64; a JSON object that describes the content; its length and CRC-32. The file is
mapped, so that the processes of a host share its pages.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import socket
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from largebatch.config.datasets import DatasetConfig
from largebatch.data.images import MemoryImages
from largebatch.data.split import Split
from largebatch.errors import UserError

FOLDER = ".largebatch"  # in dataset.root
_MAGIC = b"LBPIXEL1"  # the digit is the version of the format
_END = struct.Struct("<QQ")

Say = Callable[[str], None]
Block = tuple[NDArray[np.uint8], Tensor, list[str]]  # pixels [n, C, S, S], labels [n], files that can't be read
T = TypeVar("T")


class Stale(Exception):
    """A kept file is missing (empty message) or can't be used; the message continues a sentence after its name."""


@dataclass(frozen=True)
class Decoded:
    """Both splits in memory. ``unreadable``: the skipped images, relative to ``dataset.root``."""

    train: Split
    test: Split
    classes: tuple[str, ...]
    unreadable: tuple[str, ...]


def cache_path(config: DatasetConfig, what: str) -> Path:
    return Path(config.root) / FOLDER / f"{config.name}-{what}"


def relative_names(paths: Iterable[str], root: str) -> list[str]:
    prefix = f"{Path(root)}{os.sep}"
    return [path.removeprefix(prefix) for path in paths]


def fingerprint(root: str, paths: Sequence[str], settings: object) -> str:
    """Return hex digits that depend on ``settings`` (by repr) and on each file's path in ``root``, size and time."""
    lines = [repr((_MAGIC, settings))]
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
        try:
            return _read(path, read)
        except Stale:
            with alone(path, say):
                return _read_or_write(path, read, write, doing, say)
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


def _read_or_write(
    path: Path, read: Callable[[BinaryIO], T], write: Callable[[BinaryIO], None], doing: str, say: Say
) -> T:
    try:
        return _read(path, read)  # another process may have written it meanwhile
    except Stale as stale:
        if str(stale):
            say(f"{path} {stale}: it is written again")
        say(f"{doing}; later starts read the result from {path}")
    _write(path, write)
    try:
        return _read(path, read)
    except Stale as stale:
        raise UserError(
            f"{path} was just written and {stale}: are the files beside it being changed? Start again"
        ) from stale


@contextmanager
def alone(path: Path, say: Say) -> Iterator[None]:
    """Hold a lock that one process has at a time; the operating system releases it when the process ends."""
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
    file.write(_MAGIC)
    unreadable: list[str] = []
    labels: list[Tensor] = []
    counts: list[int] = []
    shape: tuple[int, ...] = ()
    for blocks in (train, test):
        counts.append(0)
        for pixels, block_labels, left_out in blocks:
            file.write(np.ascontiguousarray(pixels).data)
            shape = pixels.shape[1:]
            counts[-1] += len(pixels)
            labels.append(block_labels)
            unreadable += left_out
    file.write(bytes(-file.tell() % 8))
    for block_labels in labels:
        file.write(block_labels.numpy().data)
    file.flush()
    described = {
        "fingerprint": fingerprint,
        "shape": shape,
        "counts": counts,
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
    size = os.fstat(file.fileno()).st_size
    if size < len(_MAGIC) + _END.size:
        raise Stale("is cut short")
    content = np.memmap(file, np.uint8, mode="c")
    length, crc = _END.unpack(content[size - _END.size :].tobytes())
    body = size - _END.size - length
    text = content[max(body, 0) : size - _END.size].tobytes()
    if content[: len(_MAGIC)].tobytes() != _MAGIC or body < len(_MAGIC) or zlib.crc32(text) != crc:
        raise Stale("is damaged or cut short")
    described = json.loads(text)
    if described["fingerprint"] != fingerprint:
        raise Stale("is of other files or settings")
    train, test = described["counts"]
    shape = tuple(described["shape"])
    pixels_end = len(_MAGIC) + (train + test) * math.prod(shape)
    labels_start = body - 8 * (train + test)
    if labels_start != pixels_end + -pixels_end % 8 or _checksum(content[:body]) != described["checksum"]:
        raise Stale("is damaged")
    pixels = torch.from_numpy(content[len(_MAGIC) : pixels_end]).view(train + test, *shape)
    labels = torch.from_numpy(content[labels_start:body]).view(torch.int64).clone()
    return Decoded(
        Split(MemoryImages(pixels[:train]), labels[:train]),
        Split(MemoryImages(pixels[train:]), labels[train:]),
        tuple(described["classes"]),
        tuple(described["unreadable"]),
    )


def _checksum(content: NDArray[np.uint8]) -> int:
    """Return the sum of the 64-bit words: as fast as memory, and different after any changed or lost byte."""
    return int(content.view(np.int64).sum())
