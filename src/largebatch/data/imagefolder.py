"""Data sets of image files: class folders with images of any size and mode, and Tiny ImageNet as published."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from largebatch.config.datasets import DatasetConfig
from largebatch.data.cache import Say
from largebatch.data.download import find_or_download
from largebatch.data.images import Split, split_of_files
from largebatch.errors import UserError

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".webp", ".avif", ".ppm", ".pgm",
    ".pbm", ".pnm", ".tif", ".tiff", ".tga", ".jp2",
)  # fmt: skip
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
        UserError: naming the folder that is missing, empty or not among the training classes; or
            ``dataset.image_size`` if it isn't set.
    """
    root, size = Path(config.root), config.image_size
    if size is None:
        raise UserError(f"dataset.image_size=null: dataset={config.name} needs the side in pixels to resize images to")
    train_folder, test_folder = root / "train", root / "test"
    if not test_folder.is_dir() or ((root / "val").is_dir() and not _folders(test_folder)):
        test_folder = root / "val"
    for folder, name in ((train_folder, "train/"), (test_folder, "test/ or val/")):
        if not folder.is_dir():
            raise UserError(
                f"dataset={config.name}: no {name} in dataset.root={root}; it must contain train/<class>/... and "
                "test/<class>/... or val/<class>/..."
            )
    left_out: list[str] = []
    train = {
        name: image_files(train_folder / folder, left_out)
        for name, folder in class_folders(train_folder, at_least=2).items()
    }
    test = {name: image_files(test_folder / folder, left_out) for name, folder in class_folders(test_folder).items()}
    _name_left_out(left_out, say)
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


def class_folders(tree: Path, at_least: int = 1) -> dict[str, str]:
    """Return the class folders in ``tree`` by the class's name, sorted.

    A name is in Unicode's composed form (NFC), because other systems may decompose accents.

    Raises:
        UserError: if there are too few, or two with one name.
    """
    found: dict[str, str] = {}
    for folder in _folders(tree):
        name = unicodedata.normalize("NFC", folder)
        if name in found:
            raise UserError(f"{tree / folder}: a second folder of class {name}, with another spelling in Unicode")
        found[name] = folder
    if len(found) < at_least:
        raise UserError(f"{tree}: {len(found)} class folders found, at least {at_least} needed")
    return dict(sorted(found.items()))


def _folders(tree: Path) -> list[str]:
    return sorted(entry.name for entry in tree.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def image_files(top: Path, left_out: list[str]) -> list[str]:
    """Return the sorted image files below the folder ``top``, and add the other visible files to ``left_out``.

    A folder with several names, by links, is read once. A link to a folder that contains it is left out too.

    Raises:
        UserError: if there are no images.
    """

    def fail(error: OSError) -> None:
        raise error  # os.walk would ignore a folder that it can't read

    found: list[str] = []
    others: list[str] = []
    real = top.resolve()
    seen = {_identity(folder) for folder in (real, *real.parents)}
    for place, folders, names in os.walk(top, onerror=fail, followlinks=True):
        inside = []
        for name in sorted(name for name in folders if name[0] != "."):
            identity = _identity(f"{place}/{name}")
            if identity in seen:
                others.append(f"{place}/{name}")
            else:
                seen.add(identity)
                inside.append(name)
        folders[:] = inside
        for name in names:
            if name[0] != ".":
                (found if name.lower().endswith(EXTENSIONS) else others).append(f"{place}/{name}")
    if not found:
        which = f"; it has {others[0]}" if others else ""
        raise UserError(f"{top} has no images ({' '.join(EXTENSIONS)}){which}")
    left_out += sorted(others)
    return sorted(found)


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


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
