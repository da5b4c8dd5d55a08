"""CIFAR-10 and CIFAR-100 in their published "python version": pickles of 32x32 RGB images."""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from largebatch.config.datasets import DatasetConfig
from largebatch.data.cache import Block, Say, cache_path, fingerprint, kept, read_decoded, write_decoded
from largebatch.data.download import find_or_download, md5_of
from largebatch.data.images import Split, resize
from largebatch.errors import UserError


@dataclass(frozen=True)
class Archive:
    """Source and content of a version of CIFAR: file names with their md5, and the keys of the pickles."""

    url: str
    md5: str
    folder: str
    train: dict[str, str]
    test: dict[str, str]
    meta: dict[str, str]
    labels_key: str
    names_key: str


# Names and checksums as in torchvision.datasets, which takes 1.2 s to import; a test compares them.
ARCHIVES = {
    "cifar10": Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        train={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        test={"test_batch": "40351d587109b95175f43aff81a1287e"},
        meta={"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
        labels_key="labels",
        names_key="label_names",
    ),
    "cifar100": Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        train={"train": "16019d7e3df5f24257cddd939b257f8d"},
        test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        meta={"meta": "7973b15100ade9c7d40fb424638fde48"},
        labels_key="fine_labels",
        names_key="fine_label_names",
    ),
}


def load_cifar(config: DatasetConfig, say: Say) -> tuple[Split, Split, tuple[str, ...]]:
    """Load CIFAR-10 or CIFAR-100 (``config.name``) at ``config.image_size``; keep it beside the files as plain pixels.

    ``config.verify`` compares the files with their published checksums. Without it, files of the same format may have
    any number of images. The pickles can create arrays and plain values only, and call nothing else.

    Raises:
        UserError: if files are missing, differ from the published files, or can't be read.
    """
    archive = ARCHIVES[config.name]
    files = {**archive.train, **archive.test, **archive.meta}
    folder = find_or_download(config, archive.folder, tuple(files), archive.url, archive.md5)
    size = config.image_size or 32
    # The fingerprint differs with verify, because pixels of files that weren't compared must not count as verified.
    source = fingerprint(config.root, [f"{folder}/{name}" for name in files], (size, files if config.verify else None))

    def write(file: BinaryIO) -> None:
        if config.verify:
            for name, md5 in files.items():
                _verify(folder / name, md5)
        classes = _read_names(folder / next(iter(archive.meta)), archive.names_key)
        train, test = (
            _read_split([folder / name for name in part], archive.labels_key, len(classes), size)
            for part in (archive.train, archive.test)
        )
        write_decoded(file, source, classes, [train], [test])

    read = partial(read_decoded, fingerprint=source)
    found = kept(cache_path(config, 3, size), read, write, f"reading the files of {config.name}", say)
    return found.train, found.test, found.classes


def _verify(path: Path, md5: str) -> None:
    found = md5_of(path)
    if found != md5:
        raise UserError(
            f"{path} isn't the published file (md5 {found}, published {md5}): delete {path.parent} to download it "
            "again, or set dataset.verify=false to use the file as it is"
        )


def _read_names(path: Path, key: str) -> tuple[str, ...]:
    names = _read(path).get(key)
    if not isinstance(names, list) or len(names) < 2:
        raise _unusable(path, f"it has no list of class names under {key!r}")
    return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)


def _read_split(paths: list[Path], labels_key: str, num_classes: int, size: int) -> Block:
    parts = [_read_batch(path, labels_key, num_classes) for path in paths]
    pixels = np.concatenate([images for images, _ in parts])
    labels = np.concatenate([labels for _, labels in parts])
    return resize(torch.from_numpy(pixels), size).numpy(), torch.from_numpy(labels), []


def _read_batch(path: Path, labels_key: str, num_classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    entry = _read(path)
    if "data" not in entry or labels_key not in entry:
        found = ", ".join(sorted(map(str, entry)))
        raise _unusable(path, f"it needs the keys 'data' and {labels_key!r} and has {found or 'none'}")
    data, labels = entry["data"], np.asarray(entry[labels_key])
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise _unusable(path, f"'data' must be a uint8 array of n x 3072 and is {found}")
    if len(data) == 0 or labels.shape != (len(data),) or labels.dtype.kind not in "iu":
        raise _unusable(path, f"{labels_key!r} must be one integer for each of its {len(data)} images (at least one)")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise _unusable(path, f"{labels_key!r} has values outside 0..{num_classes - 1}")
    return data.reshape(-1, 3, 32, 32), labels.astype(np.int64)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            entry = _ArrayUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a damaged pickle can end in any exception
        raise _unusable(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(entry, dict):
        raise _unusable(path, f"it holds a {type(entry).__name__} instead of a dict")
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in entry.items()}


def _unusable(path: Path, why: str) -> UserError:
    return UserError(f"{path} isn't a usable CIFAR file: {why}; it may be damaged or cut short, download it again")


_NUMPY_CORE = "numpy.core" if np.__version__.startswith("1.") else "numpy._core"


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler that allows only the parts of numpy arrays, so that no pickle can run code."""

    _ALLOWED = frozenset(
        {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
        | {(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")}
        | {(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it needs {module}.{name}, which no CIFAR file does")
        return super().find_class(re.sub(r"^numpy\._?core", _NUMPY_CORE, module), name)
