"""Data sets of encoded images of any size and mode: class folders, Arrow shards, and Tiny ImageNet as published."""

from __future__ import annotations

from pathlib import Path

import torch

from largebatch.config.arrow import find_rows
from largebatch.config.datasets import DatasetConfig
from largebatch.config.imagefolder import EXTENSIONS, class_folders, find_images, image_files
from largebatch.data.cache import Say
from largebatch.data.download import find_or_download
from largebatch.data.encoded import RowImages
from largebatch.data.images import Split, split_of_files
from largebatch.errors import UserError

_NAMED = 3  # number of files that a line names

# Tiny ImageNet: 200 classes, 64x64, labels of the test images in a text file.
URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
_TINY_FOLDER = "tiny-imagenet-200"
_ANNOTATIONS = "val/val_annotations.txt"
_IMAGE_SIZE = 64


def load_imagefolder(config: DatasetConfig, say: Say) -> tuple[Split, Split, tuple[str, ...]]:
    """Load ``root/train/<class>/...`` and ``root/test/<class>/...``, or ``root/val`` if there is no ``root/test``.

    A ``test`` without class folders counts as missing: it has no labels. A class folder may have subfolders; hidden
    files are ignored, and a line names files with other extensions. The sorted class folders of ``train`` determine
    the labels. The images stay in their files.

    Raises:
        UserError: as ``find_images``, or if ``dataset.image_size`` isn't set.
    """
    size, left_out = config.needed("image_size"), list[str]()
    train, test = find_images(config.name, Path(config.root), left_out)
    _name_left_out(left_out, say)
    label_of = {name: label for label, name in enumerate(train)}
    train_split, test_split = (
        split_of_files([(path, label_of[name]) for name in tree for path in tree[name]], config.channels, size)
        for tree in (train, test)
    )
    return train_split, test_split, tuple(train)


def load_arrow(config: DatasetConfig, say: Say) -> tuple[Split, Split, tuple[str, ...]]:
    """Load the shards of ``root/train`` and of ``root/test``, ``root/validation`` or ``root/val``.

    The order of the images is that of the rows. The images stay in their shards.

    Raises:
        UserError: as ``find_rows``, or if ``dataset.image_size`` isn't set.
    """
    size = config.needed("image_size")
    splits = find_rows(config.name, Path(config.root))
    train, test = (
        Split(RowImages(rows.files, rows.places, config.channels, size), torch.from_numpy(rows.labels))
        for rows in splits
    )
    return train, test, splits[0].classes


def load_tinyimagenet(config: DatasetConfig, say: Say) -> tuple[Split, Split, tuple[str, ...]]:
    """Load the training set ``train/<wnid>/images`` and the test set ``val/`` (the archive's test set has no labels).

    The sorted folders of ``train`` are the classes and determine the labels. The images stay in their files; decoding
    converts them to ``config.channels`` (some files are grey) and ``config.image_size``.

    Raises:
        UserError: if files are missing, damaged or inconsistent.
    """
    folder = find_or_download(config, _TINY_FOLDER, ("train", _ANNOTATIONS, "val/images"), URL, MD5)
    classes = class_folders(folder / "train", at_least=2)
    label_of = {name: label for label, name in enumerate(classes)}
    left_out: list[str] = []
    train_files = [
        (path, label)
        for name, label in label_of.items()
        for path in image_files(folder / "train" / classes[name] / "images", left_out)
    ]
    _name_left_out(left_out, say)
    train, test = (
        split_of_files(files, config.channels, config.image_size or _IMAGE_SIZE)
        for files in (train_files, _test_files(folder, label_of))
    )
    return train, test, tuple(classes)


def _name_left_out(left_out: list[str], say: Say) -> None:
    if left_out:
        more = f" and {len(left_out) - _NAMED:,} more" if len(left_out) > _NAMED else ""
        say(
            f"left out {len(left_out):,} other files, and links to folders that were read already: "
            f"{', '.join(left_out[:_NAMED])}{more} (images are {' '.join(EXTENSIONS)})"
        )


def _test_files(folder: Path, label_of: dict[str, int]) -> list[tuple[str, int]]:
    annotations = folder / _ANNOTATIONS
    lines = [line for line in annotations.read_text(errors="replace").splitlines() if line.strip()]
    files = []
    for number, line in enumerate(lines, 1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in label_of:
            raise UserError(
                f"{annotations}, line {number}: {line!r} must be a file name, a tab and one of the {len(label_of)} "
                "classes in train/"
            )
        files.append((f"{folder}/val/images/{fields[0]}", label_of[fields[1]]))
    if not files:
        raise UserError(f"{annotations} is empty: the archive isn't unpacked completely")
    return files
