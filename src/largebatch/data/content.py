"""Fingerprint of a data set, so that a resumed run and the report recognise other data under the same name."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from largebatch.data.encoded import FileImages, RowImages, relative_names
from largebatch.data.images import Split

_NAMED = 3  # number of classes that a message names
_DIGITS = 16


@dataclass(frozen=True)
class Content:
    """Description of both splits before a validation set is held out.

    Attributes:
        classes: name, training images and test images of each class, in the order of the labels.
        skipped: number of images that can't be read and are left out; they count in ``classes``.
        digest: hex digits, a hash of the above and of all images (see ``content_of``).
    """

    classes: list[tuple[str, int, int]]
    skipped: int
    digest: str

    def difference(self, before: dict[str, Any]) -> str:
        """Return what differs from ``before``, a ``Content`` as a dict; empty if nothing does."""
        if before["digest"] == self.digest:
            return ""
        old = {name: (train, test) for name, train, test in before["classes"]}
        new = {name: (train, test) for name, train, test in self.classes}
        found = []
        if removed := [name for name in old if name not in new]:
            found.append(f"without class {_listed(removed)}")
        if added := [name for name in new if name not in old]:
            found.append(f"with new class {_listed(added)}")
        counts = [
            f"class {name}: {new[name][part]:,} {split} images instead of {old[name][part]:,}"
            for name in new
            for part, split in enumerate(("training", "test"))
            if name in old and new[name][part] != old[name][part]
        ]
        if counts:
            found.append(_listed(counts))
        if self.skipped != before["skipped"]:
            found.append(f"{self.skipped:,} unreadable images skipped instead of {before['skipped']:,}")
        if not found and list(old) != list(new):
            found.append("the classes are in another order")
        return "; ".join(found) or "the same classes and counts, but other images (names, sizes, labels or pixels)"


def content_of(train: Split, test: Split, classes: tuple[str, ...], root: str, unreadable: Iterable[str]) -> Content:
    """Return the content of a data set.

    The digest depends on class names and labels. It depends on the name below ``root`` and the size in bytes of each
    file, and not on its bytes, time or folder; on the size of each row, and not on the division of rows into files; or
    on the sum of each image's pixels if the images are in memory.
    """
    unreadable = list(unreadable)
    digest = hashlib.sha256(repr((classes, unreadable)).encode(errors="surrogateescape"))
    for split in (train, test):
        digest.update(split.labels.numpy().tobytes())
        for part in _described(split, root):
            digest.update(part)
    counts = [torch.bincount(split.labels, minlength=len(classes)).tolist() for split in (train, test)]
    return Content(list(zip(classes, *counts, strict=True)), len(unreadable), digest.hexdigest()[:_DIGITS])


def _described(split: Split, root: str) -> Iterator[bytes]:
    images = split.images
    if isinstance(images, FileImages):
        for path, name in zip(images.paths, relative_names(images.paths, root), strict=True):
            try:
                size = os.stat(path).st_size
            except OSError:  # for example a broken link, which counts as unreadable
                size = -1
            # A copy on another system may decompose accents.
            yield f"{unicodedata.normalize('NFC', name)}\0{size}\n".encode(errors="surrogateescape")
    elif isinstance(images, RowImages):
        yield images.places[:, -1].tobytes()
    else:
        rows = images.pixels.flatten(1)
        words = rows.view(torch.int64) if rows.shape[1] % 8 == 0 else rows  # eight bytes at a time
        yield words.sum(1, dtype=torch.int64).numpy().tobytes()


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - _NAMED:,} more" if len(items) > _NAMED else ""
    return ", ".join(items[:_NAMED]) + more
