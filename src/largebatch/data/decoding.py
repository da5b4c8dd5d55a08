"""Decoding of image files once for all starts, and the treatment of files that can't be read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
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
    relative_names,
    write_decoded,
)
from largebatch.data.images import FileImages, decode, decoded_blocks
from largebatch.data.split import Split
from largebatch.errors import UserError

_NAMED = 3  # number of unreadable images that a message names


def decode_all(
    train: Split, test: Split, classes: tuple[str, ...], config: DatasetConfig, threads: int, say: Say
) -> Decoded:
    """Return both splits of image files as pixels in memory, from the file kept beside the data if it is up to date.

    Raises:
        UserError: naming images that can't be read, unless ``config.on_error`` is ``skip``.
    """
    doing = f"decoding {len(train) + len(test):,} images"
    found = _kept(train, test, classes, config, threads, doing, say)
    _accept(found.unreadable, found.train, found.test, config, say)
    return found


def check_all(
    train: Split, test: Split, classes: tuple[str, ...], config: DatasetConfig, threads: int, say: Say
) -> tuple[Split, Split, tuple[str, ...]]:
    """Return both splits without the image files that can't be read, and these files, relative to ``config.root``.

    Reading takes as long as decoding an epoch. Its result is kept beside the data, with images of no pixels.

    Raises:
        UserError: naming some of them, unless ``config.on_error`` is ``skip``.
    """
    tiny_train, tiny_test = (Split(replace(_images(split), image_size=0), split.labels) for split in (train, test))
    doing = (
        f"checking that {len(train) + len(test):,} images can be read, which takes as long as decoding an epoch "
        "(dataset.verify=false skips the check)"
    )
    unreadable = _kept(tiny_train, tiny_test, classes, config, threads, doing, say).unreadable
    train, test = (_without(split, unreadable, config.root) for split in (train, test))
    _accept(unreadable, train, test, config, say)
    return train, test, unreadable


def _kept(
    train: Split, test: Split, classes: tuple[str, ...], config: DatasetConfig, threads: int, doing: str, say: Say
) -> Decoded:
    images = _images(train)
    labels = [split.labels.tolist() for split in (train, test)]
    settings = (images.channels, images.image_size, classes, labels, PIL.__version__)
    source = fingerprint(config.root, images.paths + _images(test).paths, settings)

    def read(file: BinaryIO) -> Decoded:
        found = read_decoded(file, source)
        for name in found.unreadable:  # new permissions, for example, don't change a file's size and time
            if not _error(name, config):
                raise Stale(f"skips {name}, which can be read now")
        return found

    def write(file: BinaryIO) -> None:
        blocks = (_blocks(split, config.root, threads) for split in (train, test))
        write_decoded(file, source, classes, *blocks)

    return kept(cache_path(config, images.channels, images.image_size), read, write, doing, say)


def _without(split: Split, unreadable: tuple[str, ...], root: str) -> Split:
    left_out = set(unreadable)
    readable = [i for i, name in enumerate(relative_names(_images(split).paths, root)) if name not in left_out]
    return split.select(torch.tensor(readable, dtype=torch.int64))


def _images(split: Split) -> FileImages:
    assert isinstance(split.images, FileImages)
    return split.images


def _blocks(split: Split, root: str, threads: int) -> Iterator[Block]:
    """Yield the blocks for ``write_decoded``: pixels, their labels, and the names of the files that can't be read."""
    images = _images(split)
    first = 0
    for pixels, unreadable in decoded_blocks(images, threads):
        readable = torch.ones(len(pixels) + len(unreadable), dtype=torch.bool)
        readable[[i - first for i in unreadable]] = False
        labels = split.labels[first : first + len(readable)][readable]
        yield pixels, labels, relative_names((images.paths[i] for i in unreadable), root)
        first += len(readable)


def _accept(unreadable: tuple[str, ...], train: Split, test: Split, config: DatasetConfig, say: Say) -> None:
    """Log the ``unreadable`` images that are missing from the splits, or raise ``UserError``."""
    if not unreadable:
        return
    total = len(train) + len(test) + len(unreadable)
    if config.on_error == "skip":
        say(f"skipped {len(unreadable):,} of {total:,} images, which can't be read: {_some(unreadable)}")
        for name, split in (("training", train), ("test", test)):
            if len(split) == 0:
                raise UserError(f"dataset.on_error=skip: no image of the {name} set in {config.root} can be read")
        return
    message = _error(unreadable[0], config) or f"{unreadable[0]} couldn't be read as an image"
    others = unreadable[1:]
    if others:
        message += f". {len(others):,} more of {total:,} images can't be read: {_some(others)}"
    raise UserError(f"{message}. dataset.on_error=skip skips such images")


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _error(name: str, config: DatasetConfig) -> str:
    """Return the message of the error from decoding the file; empty if it can be read."""
    try:
        decode(str(Path(config.root) / name), config.channels, image_size=0)
    except UserError as error:
        return str(error)
    return ""
