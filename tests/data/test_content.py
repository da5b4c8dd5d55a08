"""The fingerprint of a data set: what it depends on, and the words for a difference."""

import shutil
from dataclasses import asdict

import pytest
from datafiles import make_cifar10, make_imagefolder

from largebatch.config.datasets import DatasetConfig
from largebatch.data import load, load_data


def content(root, **options):
    return load_data(DatasetConfig(name="imagefolder", root=str(root), **{"image_size": 16, **options}), 0).content


def rename_class(root):
    for part in ("train", "test"):
        (root / part / "cat").rename(root / part / "zebra")


def add_images(root):
    for i in range(2):
        shutil.copy(root / "train" / "dog" / "0.png", root / "train" / "dog" / f"new{i}.png")


def remove_class(root):
    for part in ("train", "test"):
        shutil.rmtree(root / part / "eel")


def replace_image(root):
    (root / "train" / "dog" / "0.png").write_bytes((root / "train" / "eel" / "0.png").read_bytes() + bytes(1000))


def move_image(root):
    (root / "train" / "dog" / "5.png").rename(root / "train" / "eel" / "moved.png")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename_class, "without class cat; with new class zebra"),
        (add_images, "class dog: 8 training images instead of 6"),
        (remove_class, "without class eel"),
        (replace_image, "the same classes and counts, but other images (names, sizes, labels or pixels)"),
        (move_image, "class dog: 5 training images instead of 6, class eel: 7 training images instead of 6"),
    ],
)
def test_other_data_differ_in_words(tmp_path, change, words):
    make_imagefolder(tmp_path)
    before = content(tmp_path)
    change(tmp_path)
    assert content(tmp_path).difference(asdict(before)) == words


def test_a_copy_in_another_folder_or_memory_is_the_same_data(tmp_path, monkeypatch):
    make_imagefolder(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    before = content(tmp_path / "one")
    assert content(tmp_path / "two", val_fraction=0.5) == before
    monkeypatch.setattr(load, "host_memory", lambda: 1000)
    assert content(tmp_path / "two", workers=0) == before


def test_a_skipped_image_makes_other_data(tmp_path):
    make_imagefolder(tmp_path)
    before = content(tmp_path)
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"x")
    assert "1 unreadable images skipped instead of 0" in content(tmp_path, on_error="skip").difference(asdict(before))


def test_pixels_and_labels_of_archives_count(tmp_path):
    def of(root):
        return load_data(DatasetConfig(name="cifar10", root=str(root), download=False, verify=False), 0).content

    first, same, other = (of(make_cifar10(tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first == same
    assert first.difference(asdict(other))
