"""Data sets of image files: class folders with images of any size and mode, and Tiny ImageNet as published."""

from __future__ import annotations

import os
from pathlib import Path

from largebatch.config.datasets import DatasetConfig
from largebatch.data.cache import Say
from largebatch.data.download import find_or_download
from largebatch.data.images import Split, split_of_files
from largebatch.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")

# Tiny ImageNet: 200 classes, 64x64, labels of the test images in a text file.
URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
_TINY_FOLDER = "tiny-imagenet-200"
_ANNOTATIONS = "val/val_annotations.txt"
_IMAGE_SIZE = 64


def load_imagefolder(config: DatasetConfig, say: Say) -> tuple[Split, Split, tuple[str, ...]]:
    """Load ``root/train/<class>/...`` and ``root/test/<class>/...``, or ``root/val`` if there is no ``root/test``.

    A class folder may have subfolders; hidden files and other extensions are ignored. The sorted class folders of
    ``train`` determine the labels. The images stay in their files.

    Raises:
        UserError: naming the folder that is missing, empty or not among the training classes; or
            ``dataset.image_size`` if it isn't set.
    """
    root, size = Path(config.root), config.image_size
    if size is None:
        raise UserError(f"dataset.image_size=null: dataset={config.name} needs the side in pixels to resize images to")
    train_folder, test_folder = root / "train", root / "test" if (root / "test").is_dir() else root / "val"
    for folder, name in ((train_folder, "train/"), (test_folder, "test/ or val/")):
        if not folder.is_dir():
            raise UserError(
                f"dataset={config.name}: no {name} in dataset.root={root}; it must contain train/<class>/... and "
                "test/<class>/... or val/<class>/..."
            )
    train = {name: image_files(train_folder / name) for name in class_folders(train_folder, at_least=2)}
    test = {name: image_files(test_folder / name) for name in class_folders(test_folder)}
    unknown = [name for name in test if name not in train]
    if unknown:
        raise UserError(f"{test_folder / unknown[0]}: no such class in {train_folder}, which determines the classes")

    label_of = {name: label for label, name in enumerate(train)}
    train_split, test_split = (
        split_of_files([(path, label_of[name]) for name in tree for path in tree[name]], config.channels, size)
        for tree in (train, test)
    )
    return train_split, test_split, tuple(train)


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
    train_files = [
        (path, label) for name, label in label_of.items() for path in image_files(folder / "train" / name / "images")
    ]
    train, test = (
        split_of_files(files, config.channels, config.image_size or _IMAGE_SIZE)
        for files in (train_files, _test_files(folder, label_of))
    )
    return train, test, tuple(classes)


def class_folders(tree: Path, at_least: int = 1) -> list[str]:
    """Return the sorted names of the class folders in ``tree``; raise ``UserError`` if there are too few."""
    names = sorted(entry.name for entry in tree.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(names) < at_least:
        raise UserError(f"{tree}: {len(names)} class folders found, at least {at_least} needed")
    return names


def image_files(folder: Path) -> list[str]:
    """Return the sorted image files below ``folder``; raise ``UserError`` if there are none."""

    def fail(error: OSError) -> None:
        raise error  # os.walk would ignore a folder that it can't read

    found = []
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [f"{place}/{name}" for name in names if name.lower().endswith(EXTENSIONS) and name[0] != "."]
    if not found:
        raise UserError(f"{folder} has no images ({' '.join(EXTENSIONS)})")
    return sorted(found)


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
