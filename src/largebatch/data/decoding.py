"""Decoding of encoded images once for all starts, and the treatment of images that can't be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import BinaryIO

import PIL
import torch

from largebatch.config.datasets import DatasetConfig
from largebatch.data.cache import (
    Block,
    Decoded,
    Say,
    Stale,
    cache_path,
    fingerprint,
    kept,
    read_decoded,
    write_decoded,
)
from largebatch.data.encoded import EncodedImages, Source, relative_names
from largebatch.data.images import MemoryImages, Split, decoded_blocks
from largebatch.data.images import decode as decode_one
from largebatch.errors import UserError

_NAMED = 3  # number of unreadable images that a message names


def read_files(
    train: Split, test: Split, classes: tuple[str, ...], config: DatasetConfig, threads: int, say: Say, *, decode: bool
) -> Decoded:
    """Return both splits of encoded images without the images that can't be read.

    With ``decode``, the images are pixels in memory. Otherwise they stay encoded, and are only checked, which takes
    as long as decoding. A file beside the data keeps the pixels, or without ``decode`` the names of unreadable images.

    Raises:
        UserError: naming images that can't be read, unless ``config.on_error`` is ``skip``.
    """
    doing = f"decoding {len(train) + len(test):,} images"
    sources = [train, test]
    if not decode:
        sources = [Split(replace(_images(split), image_size=0), split.labels) for split in sources]
        doing = (
            f"checking that {len(train) + len(test):,} images can be read, which takes as long as decoding an epoch "
            "(dataset.verify=false skips the check)"
        )
    channels, image_size = _images(sources[0]).channels, _images(sources[0]).image_size
    labels = [split.labels.tolist() for split in sources]
    settings = (channels, image_size, classes, labels, PIL.__version__)
    source = fingerprint(config.root, _images(train).files + _images(test).files, settings)

    def read(file: BinaryIO) -> Decoded:
        found = read_decoded(file, source)
        for image in _named(found.unreadable, (train, test), config.root):
            if not _error(image, config):  # new permissions, for example, don't change a file's size and time
                raise Stale(f"skips {relative_names([image], config.root)[0]}, which can be read now")
        return found

    def write(file: BinaryIO) -> None:
        blocks = (_blocks(split, config.root, threads) for split in sources)
        write_decoded(file, source, classes, *blocks)

    found = kept(cache_path(config, channels, image_size), read, write, doing, say)
    first = next(iter(_named(found.unreadable[:1], (train, test), config.root)), None)
    if not decode:
        train, test = (_without(split, found.unreadable, config.root) for split in (train, test))
        found = Decoded(train, test, classes, found.unreadable)
    if first is not None:
        _accept(found, first, config, say)
    return found


def _named(names: Sequence[str], splits: Sequence[Split], root: str) -> list[Source]:
    """Return the images of the relative ``names``."""
    if not names:
        return []
    wanted, images = set(names), [_images(split) for split in splits]
    every = [each.source(i) for each in images for i in range(len(each))]
    return [image for image, name in zip(every, relative_names(every, root), strict=True) if name in wanted]


def _without(split: Split, unreadable: tuple[str, ...], root: str) -> Split:
    if not unreadable:
        return split
    left_out, images = set(unreadable), _images(split)
    names = relative_names(map(images.source, range(len(images))), root)
    readable = [i for i, name in enumerate(names) if name not in left_out]
    return split.select(torch.tensor(readable, dtype=torch.int64))


def _images(split: Split) -> EncodedImages:
    assert not isinstance(split.images, MemoryImages)
    return split.images


def _blocks(split: Split, root: str, threads: int) -> Iterator[Block]:
    """Yield the blocks for ``write_decoded``: pixels, their labels, and the names of the images that can't be read."""
    images = _images(split)
    first = 0
    for pixels, unreadable in decoded_blocks(images, threads):
        block = range(first, first + len(pixels) + len(unreadable))
        readable = torch.tensor(sorted(set(block).difference(unreadable)), dtype=torch.int64)
        yield pixels, split.labels[readable], relative_names(map(images.source, unreadable), root)
        first = block.stop


def _accept(found: Decoded, first: Source, config: DatasetConfig, say: Say) -> None:
    """Log the images that can't be read, of which ``first`` is the first, or raise ``UserError``."""
    count = len(found.unreadable)
    named = ", ".join(found.unreadable[:_NAMED]) + (f" and {count - _NAMED:,} more" if count > _NAMED else "")
    total = len(found.train) + len(found.test) + count
    some = f"{count:,} of {total:,} images, which can't be read: {named}"
    if config.on_error != "skip":
        raise UserError(f"{_error(first, config)}. Fix: dataset.on_error=skip skips {some}")
    say(f"skipped {some}")
    for name, split in (("training", found.train), ("test", found.test)):
        if len(split) == 0:
            raise UserError(f"dataset.on_error=skip: no image of the {name} set in {config.root} can be read")


def _error(image: Source, config: DatasetConfig) -> str:
    """Return the message of the error when the image is decoded; empty if it can be read."""
    try:
        decode_one(image, config.channels, image_size=0)
    except UserError as error:
        return str(error)
    return ""
