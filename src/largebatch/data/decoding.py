"""Image files decoded once for all starts, and what becomes of those that can't be read."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
from largebatch.data.images import FileImages, decode, decoded_blocks, is_readable, unreadable_files
from largebatch.data.split import Split
from largebatch.errors import UserError

_NAMED = 3  # of the images that can't be read


def decode_all(
    train: Split, test: Split, classes: tuple[str, ...], config: DatasetConfig, threads: int, say: Say
) -> Decoded:
    """Both splits of image files as pixels in memory, from the file kept beside the data where that is up to date.

    Raises:
        UserError: naming images that can't be read, where ``config.on_error`` isn't ``skip``.
    """
    images = _images(train)
    labels = [split.labels.tolist() for split in (train, test)]
    settings = (images.channels, images.image_size, classes, labels, PIL.__version__)
    source = fingerprint(config.root, _images(train).paths + _images(test).paths, settings)

    def read(file: BinaryIO) -> Decoded:
        found = read_decoded(file, source)
        _refuse_if_mended(found.unreadable, config)
        return found

    def write(file: BinaryIO) -> None:
        blocks = (_blocks(split, config.root, threads) for split in (train, test))
        write_decoded(file, source, classes, *blocks)

    path = cache_path(config, f"{images.channels}x{images.image_size}.pixels")
    found = kept(path, read, write, f"decoding {len(train) + len(test):,} images", say)
    _accept(found.unreadable, len(train) + len(test), config, say)
    _refuse_empty(found.train, found.test, config)
    return found


def check_all(train: Split, test: Split, config: DatasetConfig, threads: int, say: Say) -> tuple[str, ...]:
    """The image files that can't be read, relative to ``config.root``: a list that is kept beside the data.

    Raises:
        UserError: naming some of them, where ``config.on_error`` isn't ``skip``.
    """
    paths = _images(train).paths + _images(test).paths
    channels = _images(train).channels
    source = fingerprint(config.root, paths, (channels, PIL.__version__))

    def read(file: BinaryIO) -> tuple[str, ...]:
        try:
            found = json.loads(file.read())
            unreadable = tuple(found["unreadable"])
        except (ValueError, KeyError, TypeError):
            raise Stale("is damaged") from None
        if found["fingerprint"] != source:
            raise Stale("is of other files or settings")
        _refuse_if_mended(unreadable, config)
        return unreadable

    def write(file: BinaryIO) -> None:
        say("that takes as long as decoding them for an epoch does; dataset.verify=false leaves it out")
        images = FileImages(paths, channels, 1)
        unreadable = relative_names((paths[i] for i in unreadable_files(images, threads)), config.root)
        file.write(json.dumps({"fingerprint": source, "unreadable": unreadable}).encode())

    path = cache_path(config, f"{channels}.unreadable.json")
    unreadable = kept(path, read, write, f"checking that {len(paths):,} images can be read", say)
    _accept(unreadable, len(paths), config, say)
    _refuse_empty(without(train, unreadable, config.root), without(test, unreadable, config.root), config)
    return unreadable


def without(split: Split, unreadable: tuple[str, ...], root: str) -> Split:
    """A split of image files less the ``unreadable`` ones, which are named relative to ``root``."""
    if not unreadable:
        return split
    left_out = set(unreadable)
    readable = [i for i, name in enumerate(relative_names(_images(split).paths, root)) if name not in left_out]
    return split.select(torch.tensor(readable, dtype=torch.int64))


def _images(split: Split) -> FileImages:
    assert isinstance(split.images, FileImages)
    return split.images


def _path(name: str, root: str) -> str:
    return str(Path(root) / name)


def _blocks(split: Split, root: str, threads: int) -> Iterator[Block]:
    """What ``write_decoded`` takes: pixels, their labels, and the names of the files that can't be read."""
    images = _images(split)
    first = 0
    for pixels, unreadable in decoded_blocks(images, threads):
        is_here = torch.ones(len(pixels) + len(unreadable), dtype=torch.bool)
        is_here[[i - first for i in unreadable]] = False
        labels = split.labels[first : first + len(is_here)][is_here]
        yield pixels, labels, relative_names((images.paths[i] for i in unreadable), root)
        first += len(is_here)


def _refuse_if_mended(unreadable: tuple[str, ...], config: DatasetConfig) -> None:
    """A file may have become readable with its size and time unchanged, by other permissions for example."""
    for name in unreadable:
        if is_readable(_path(name, config.root), config.channels):
            raise Stale(f"leaves out {name}, which can be read now")


def _accept(unreadable: tuple[str, ...], total: int, config: DatasetConfig, say: Say) -> None:
    if not unreadable:
        return
    if config.on_error == "skip":
        say(f"left out {len(unreadable):,} of {total:,} images, which can't be read: {_some(unreadable)}")
        return
    message, others = _why(_path(unreadable[0], config.root), config.channels), unreadable[1:]
    if others:
        message += f". {len(others):,} more of {total:,} images can't be read: {_some(others)}"
    raise UserError(f"{message}. dataset.on_error=skip leaves such images out")


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _why(path: str, channels: int) -> str:
    try:
        decode(path, channels, 1)
    except UserError as error:
        return str(error)
    return f"{path} couldn't be read as an image"  # and was mended this very moment


def _refuse_empty(train: Split, test: Split, config: DatasetConfig) -> None:
    for name, split in (("training", train), ("test", test)):
        if len(split) == 0:
            raise UserError(f"dataset.on_error=skip: no image of the {name} set in {config.root} can be read")
