"""Random damage to every kind of data file gives a valid data set or one message that names the file."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from datafiles import make_arrow, make_cifar10, make_imagefolder, make_tinyimagenet

from largebatch.config.datasets import DatasetConfig
from largebatch.data import load_data
from largebatch.errors import UserError

SEEDS = range(8 * int(os.environ.get("FAULTS_EXAMPLES", "1")))


def random_bytes(content: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(300))


def cut_short(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def changed_bytes(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randrange(1, 20)):
        changed[rng.randrange(min(len(changed), 400))] = rng.randrange(256)
    return bytes(changed)


def swapped_halves(content: bytes, rng: random.Random) -> bytes:
    middle = rng.randrange(len(content))
    return content[middle:] + content[:middle]


def arrow(root: Path) -> Path:
    tree = make_imagefolder(root / "tree", 12)
    make_arrow(root, tree)
    shutil.rmtree(tree)
    return root


DATASETS: dict[str, tuple[Callable[[Path], Path], dict[str, object]]] = {
    "cifar10": (lambda root: make_cifar10(root, 4, 4), {"verify": False, "download": False}),
    "tinyimagenet": (make_tinyimagenet, {"download": False}),
    "imagefolder": (lambda root: make_imagefolder(root, 12), {"image_size": 12}),
    "arrow": (arrow, {"image_size": 12}),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", [random_bytes, cut_short, changed_bytes, swapped_halves])
@pytest.mark.parametrize("name", DATASETS)
def test_damaged_files_give_data_or_a_message_with_a_path(
    tmp_path: Path, name: str, damage: Callable[[bytes, random.Random], bytes]
) -> None:
    make, options = DATASETS[name]
    make(tmp_path)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    config = DatasetConfig(name=name, root=str(tmp_path), **options)  # type: ignore[arg-type]
    for seed in SEEDS:
        rng = random.Random(seed)
        path = rng.choice(files)
        content = path.read_bytes()
        path.write_bytes(damage(content, rng))
        message, data = "", None
        try:
            data = load_data(config, 0)
        except UserError as error:
            message = str(error)
        if data is None:
            assert str(tmp_path) in message
        else:
            assert len(data.train.labels) > 0
            assert int(data.train.labels.max()) < data.num_classes
        path.write_bytes(content)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", [random_bytes, cut_short, changed_bytes, swapped_halves])
def test_a_damaged_cache_is_written_again(tmp_path: Path, damage: Callable[[bytes, random.Random], bytes]) -> None:
    make_imagefolder(tmp_path, 12)
    config = DatasetConfig(name="imagefolder", root=str(tmp_path), image_size=12)
    whole = load_data(config, 0)
    (cache,) = tmp_path.glob(".largebatch/*.pixels")
    content = cache.read_bytes()
    for seed in SEEDS:
        cache.write_bytes(damage(content, random.Random(seed)))
        data = load_data(config, 0)
        assert data.content == whole.content
        assert data.mean == whole.mean
