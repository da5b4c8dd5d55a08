"""A tree of class folders with images of any size and mode."""

from __future__ import annotations

import os
from pathlib import Path

from largebatch.config.datasets import DatasetConfig
from largebatch.data.cache import Say
from largebatch.data.split import Split, split_of_files
from largebatch.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


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
    train_folder, test_folder = _trees(root, config.name)
    train = _class_files(train_folder)
    test = _class_files(test_folder)
    if len(train) < 2:
        raise UserError(f"{train_folder} has {len(train)} class folder; it needs at least two")
    unknown = [name for name in test if name not in train]
    if unknown:
        raise UserError(f"{test_folder / unknown[0]}: no such class in {train_folder}, which determines the classes")

    label_of = {name: label for label, name in enumerate(train)}
    train_split, test_split = (
        split_of_files([(path, label_of[name]) for name in tree for path in tree[name]], config.channels, size)
        for tree in (train, test)
    )
    return train_split, test_split, tuple(train)


def _trees(root: Path, dataset: str) -> tuple[Path, Path]:
    train, test, val = root / "train", root / "test", root / "val"
    if not train.is_dir() or not (test.is_dir() or val.is_dir()):
        missing = "train/" if not train.is_dir() else "test/ or val/"
        raise UserError(
            f"dataset={dataset}: no {missing} in dataset.root={root}; it must contain train/<class>/... and "
            "test/<class>/... or val/<class>/..."
        )
    return train, test if test.is_dir() else val


def _class_files(tree: Path) -> dict[str, list[str]]:
    """Return the image files by class, both sorted."""
    names = sorted(entry.name for entry in tree.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"{tree} has no class folders")
    files = {name: _image_files(tree / name) for name in names}
    for name, found in files.items():
        if not found:
            raise UserError(f"{tree / name} has no images ({' '.join(EXTENSIONS)})")
    return files


def _image_files(folder: Path) -> list[str]:
    def fail(error: OSError) -> None:
        raise error  # os.walk would ignore a folder that it can't read

    found = []
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [f"{place}/{name}" for name in names if name.lower().endswith(EXTENSIONS) and name[0] != "."]
    return sorted(found)
