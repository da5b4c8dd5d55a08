"""Tiny ImageNet in its original layout: 200 classes, 64x64, labels of the test images in a text file."""

from __future__ import annotations

from pathlib import Path

from largebatch.config.datasets import DatasetConfig
from largebatch.data.cache import Say
from largebatch.data.download import find_or_download
from largebatch.data.imagefolder import class_folders, image_files
from largebatch.data.images import Split, split_of_files
from largebatch.errors import UserError

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
_FOLDER = "tiny-imagenet-200"
_ANNOTATIONS = "val/val_annotations.txt"
_IMAGE_SIZE = 64


def load_tinyimagenet(config: DatasetConfig, say: Say) -> tuple[Split, Split, tuple[str, ...]]:
    """Load the training set ``train/<wnid>/images`` and the test set ``val/`` (the archive's test set has no labels).

    The sorted folders of ``train`` are the classes and determine the labels. The images stay in their files; decoding
    converts them to ``config.channels`` (some files are grey) and ``config.image_size``.

    Raises:
        UserError: if files are missing, damaged or inconsistent.
    """
    folder = find_or_download(config, _FOLDER, ("train", _ANNOTATIONS, "val/images"), URL, MD5)
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
