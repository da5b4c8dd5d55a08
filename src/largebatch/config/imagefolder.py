"""Image files in class folders, listed without torch: the plan counts them and the worker decodes them."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from largebatch.errors import UserError

Tree = dict[str, list[str]]  # image files by class
EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".webp", ".avif", ".ppm", ".pgm",
    ".pbm", ".pnm", ".tif", ".tiff", ".tga", ".jp2",
)  # fmt: skip


def find_images(name: str, root: Path, left_out: list[str]) -> tuple[Tree, Tree]:
    """Return the images in ``root/train/<class>/...`` and ``root/test/<class>/...``; add other files to ``left_out``.

    ``root/val`` replaces a ``root/test`` that is missing or has no class folders: such images have no labels.

    Raises:
        UserError: naming the folder that is missing, empty or not among the training classes. ``name`` is the data
            set's.
    """
    train_folder, test_folder = root / "train", root / "test"
    if not test_folder.is_dir() or ((root / "val").is_dir() and not _folders(test_folder)):
        test_folder = root / "val"
    for folder, missing in ((train_folder, "train/"), (test_folder, "test/ or val/")):
        if not folder.is_dir():
            raise UserError(
                f"dataset={name}: no {missing} in dataset.root={root}; it must contain train/<class>/... and "
                "test/<class>/... or val/<class>/..."
            )
    train, test = (
        {label: image_files(tree / folder, left_out) for label, folder in class_folders(tree, at_least).items()}
        for tree, at_least in ((train_folder, 2), (test_folder, 1))
    )
    if unknown := [label for label in test if label not in train]:
        raise UserError(f"{test_folder / unknown[0]}: no such class in {train_folder}, which determines the classes")
    return train, test


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
