"""Makes small data sets in the true file formats. Images are their class's coarse pattern plus noise."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow
import torch
from PIL import Image

from largebatch.config.imagefolder import find_images
from largebatch.data.encoded import EncodedImages
from largebatch.data.images import decoded_blocks

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def make_cifar10(root: Path, train_per_batch: int = 20, test: int = 20, seed: int = 0) -> Path:
    """Make ``root/cifar-10-batches-py``: five training batches, test batch and names, pickled as by Python 2."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    sizes = {f"data_batch_{i}": train_per_batch for i in range(1, 6)} | {"test_batch": test}
    for name, size in sizes.items():
        labels = rng.permutation(size) % 10
        entry = {
            "batch_label": f"batch {name}",
            "labels": labels.tolist(),
            "data": pictures(rng, labels, 3, 32, seed).reshape(size, 3072),
            "filenames": [f"image_{i}.png" for i in range(size)],
        }
        (folder / name).write_bytes(python2_pickle(entry))
    meta = {"num_cases_per_batch": train_per_batch, "label_names": CIFAR10_NAMES, "num_vis": 3072}
    (folder / "batches.meta").write_bytes(python2_pickle(meta))
    return folder


def make_cifar100(root: Path, train: int = 200, test: int = 100, seed: int = 0) -> Path:
    """Make ``root/cifar-100-python``: train, test and meta, pickled as by Python 2."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for name, size in {"train": train, "test": test}.items():
        labels = rng.permutation(size) % 100
        entry = {
            "filenames": [f"image_{i}.png" for i in range(size)],
            "batch_label": f"{name} batch 1 of 1",
            "fine_labels": labels.tolist(),
            "coarse_labels": (labels // 5).tolist(),
            "data": pictures(rng, labels, 3, 32, seed).reshape(size, 3072),
        }
        (folder / name).write_bytes(python2_pickle(entry))
    meta = {
        "fine_label_names": [f"fine_{i}" for i in range(100)],
        "coarse_label_names": [f"coarse_{i}" for i in range(20)],
    }
    (folder / "meta").write_bytes(python2_pickle(meta))
    return folder


def make_tinyimagenet(root: Path, classes: int = 3, train_per_class: int = 4, val: int = 5, seed: int = 0) -> Path:
    """Make ``root/tiny-imagenet-200`` in the original layout; every fifth image is a grey JPEG, as in the original."""
    folder = root / "tiny-imagenet-200"
    rng = np.random.default_rng(seed)
    wnids = [f"n{1000000 + 37 * i:08d}" for i in range(classes)]
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in reversed(wnids)))
    (folder / "words.txt").write_text("".join(f"{wnid}\tthing {i}\n" for i, wnid in enumerate(wnids)))

    for label, wnid in enumerate(wnids):
        images = folder / "train" / wnid / "images"
        images.mkdir(parents=True)
        names = [f"{wnid}_{i}.JPEG" for i in range(train_per_class)]
        for i, pixels in enumerate(pictures(rng, np.full(train_per_class, label), 3, 64, seed)):
            save_image(images / names[i], pixels[:1] if i % 5 == 4 else pixels)
        boxes = "".join(f"{name}\t0\t0\t63\t63\n" for name in names)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(boxes)

    labels = np.arange(val) % classes
    for i, pixels in enumerate(pictures(rng, labels, 3, 64, seed)):
        save_image(folder / "val" / "images" / f"val_{i}.JPEG", pixels[:1] if i % 5 == 4 else pixels)
    lines = "".join(f"val_{i}.JPEG\t{wnids[label]}\t0\t0\t63\t63\n" for i, label in enumerate(labels))
    (folder / "val" / "val_annotations.txt").write_text(lines)
    return folder


def make_imagefolder(
    root: Path,
    size: int | tuple[int, int] = 28,
    channels: int = 3,
    classes: tuple[str, ...] = ("cat", "dog", "eel"),
    train_per_class: int = 6,
    test_per_class: int = 3,
    test_name: str = "test",
    extension: str = ".png",
    seed: int = 0,
) -> Path:
    """Make ``root/train/<class>/0.png ...`` and ``root/<test_name>/<class>/...``; ``size``: side or (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    rng = np.random.default_rng(seed)
    for tree, count in (("train", train_per_class), (test_name, test_per_class)):
        for label, name in enumerate(classes):
            folder = root / tree / name
            folder.mkdir(parents=True)
            side = max(height, width)
            for i, pixels in enumerate(pictures(rng, np.full(count, label), channels, side, seed)):
                save_image(folder / f"{i}{extension}", pixels[:, :height, :width])
    return root


def make_arrow(root: Path, tree: Path, shards: int = 2, rows: int = 4) -> Path:
    """Save the images of ``make_imagefolder`` in their order as Hugging Face datasets' ``save_to_disk`` does."""
    train, test = find_images("imagefolder", tree, [])
    names = list(train)
    for split, classes in (("train", train), ("test", test)):
        images = [(Path(path).read_bytes(), names.index(name)) for name in classes for path in classes[name]]
        save_split(root / split, [image for image, _ in images], [label for _, label in images], names, shards, rows)
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    return root


def save_split(
    folder: Path,
    images: Sequence[bytes | None],
    labels: Sequence[int | None],
    names: Sequence[str],
    shards: int = 1,
    rows: int = 4,
) -> None:
    """Save a split as ``Dataset.save_to_disk`` does, with ``rows`` images in a record batch."""
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    encoded = [{"bytes": image, "path": f"{i}.jpg"} for i, image in enumerate(images)]
    table = pyarrow.table(
        [pyarrow.array(encoded, IMAGE), pyarrow.array(labels, pyarrow.int64())], ["image", "label"]
    )  # fmt: skip
    save_table(folder, table, features, shards, rows)


IMAGE = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})


def save_table(folder: Path, table: pyarrow.Table, features: dict[str, Any], shards: int = 1, rows: int = 4) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    files = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    for i, file in enumerate(files):
        part = slice(len(table) * i // shards, len(table) * (i + 1) // shards)
        with pyarrow.ipc.new_stream(str(folder / file), table.schema) as stream:
            stream.write_table(table[part], rows)
    state = {"_data_files": [{"filename": file} for file in files], "_split": folder.name}
    (folder / "state.json").write_text(json.dumps(state | STATE, indent=2, sort_keys=True))
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))


STATE = {
    "_fingerprint": "0" * 16, "_format_columns": None, "_format_kwargs": {}, "_format_type": None,
    "_output_all_columns": False,
}  # fmt: skip


def save_image(path: Path, pixels: np.ndarray) -> None:
    """Save uint8 [1 or 3, H, W] as a grey or RGB image in the format of the file name's extension."""
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(path)


def decoded(images: EncodedImages) -> torch.Tensor:
    """Decode all images to uint8 [N, C, S, S]; all must be readable."""
    blocks, unreadable = zip(*decoded_blocks(images, threads=2), strict=True)
    assert not any(unreadable)
    return torch.from_numpy(np.concatenate(blocks))


def pictures(rng: np.random.Generator, labels: np.ndarray, channels: int, side: int, seed: int) -> np.ndarray:
    """Return uint8 [N, C, S, S]: each label's own 4x4 pattern, determined by ``seed``, and noise from ``rng``."""
    patterns = np.random.default_rng((seed, 1)).uniform(40, 215, (int(labels.max()) + 1, channels, 4, 4))
    position = np.arange(side) * 4 // side
    clean = patterns[labels][:, :, position][:, :, :, position]
    return (clean + rng.normal(0, 20, clean.shape)).clip(0, 255).astype(np.uint8)


class _Python2Pickler(pickle._Pickler):
    """Writes str and bytes as Python 2's str, as in the published CIFAR files."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_python2_str(self, text: str | bytes) -> None:
        raw = text.encode("latin1") if isinstance(text, str) else text
        if len(raw) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(raw)]) + raw)
        else:
            self.write(pickle.BINSTRING + len(raw).to_bytes(4, "little") + raw)
        self.memoize(text)

    dispatch[str] = save_python2_str
    dispatch[bytes] = save_python2_str


def python2_pickle(entry: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(entry)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
