"""Tiny ImageNet's original layout, and folder trees."""

import shutil
import unicodedata

import numpy as np
import pytest
import torch
from datafiles import make_imagefolder, make_tinyimagenet, save_image
from PIL import Image

from largebatch.config.datasets import DatasetConfig
from largebatch.data import load_data
from largebatch.errors import UserError


def tiny_config(root, **options):
    return DatasetConfig(name="tinyimagenet", root=str(root), **{"download": False, "image_size": 64, **options})


def test_tinyimagenet(tmp_path):
    folder = make_tinyimagenet(tmp_path, classes=3, train_per_class=5, val=4)
    data = load_data(tiny_config(tmp_path), 0)
    wnids = sorted(path.name for path in (folder / "train").iterdir())
    assert list(data.classes) == wnids
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert data.test.labels.tolist() == [0, 1, 2, 0]
    assert data.train.images.pixels.shape == (15, 3, 64, 64)
    for i, name in enumerate(["val_0", "val_1", "val_2", "val_3"]):
        original = np.asarray(Image.open(folder / "val" / "images" / f"{name}.JPEG")).transpose(2, 0, 1)
        assert np.array_equal(data.test.images.pixels[i].numpy(), original)
    grey = data.train.images.pixels[4]  # make_tinyimagenet writes every fifth image as a grey JPEG
    assert torch.equal(grey[0], grey[1])
    assert len(load_data(tiny_config(folder), 0).train) == 15  # the root may be the folder itself


def test_tinyimagenet_with_missing_or_wrong_parts_raises(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.root=.*missing: train, val/val_annotations\.txt"):
        load_data(tiny_config(tmp_path / "nowhere"), 0)
    folder = make_tinyimagenet(tmp_path)
    annotations = folder / "val" / "val_annotations.txt"
    original = annotations.read_text()

    annotations.write_text(original.replace(sorted(p.name for p in (folder / "train").iterdir())[1], "n99999999", 1))
    with pytest.raises(UserError, match=r"val_annotations\.txt, line 2: .*n99999999.*one of the 3 classes"):
        load_data(tiny_config(tmp_path), 0)
    annotations.write_text("")
    with pytest.raises(UserError, match=r"val_annotations\.txt is empty"):
        load_data(tiny_config(tmp_path), 0)
    annotations.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"val_annotations\.txt, line 1: "):
        load_data(tiny_config(tmp_path), 0)
    annotations.write_text(original)

    (folder / "val" / "images" / "val_1.JPEG").unlink()
    with pytest.raises(UserError, match=r"val_1\.JPEG"):
        load_data(tiny_config(tmp_path), 0)
    shutil.rmtree(next((folder / "train").iterdir()) / "images")
    with pytest.raises(UserError, match=r"images.*check dataset\.root="):
        load_data(tiny_config(tmp_path), 0)


def folder_config(root, **options):
    return DatasetConfig(name="imagefolder", root=str(root), **{"image_size": 16, **options})


@pytest.mark.parametrize(("channels", "test_name"), [(1, "test"), (3, "val")])
def test_imagefolder_of_grey_images(tmp_path, channels, test_name):
    make_imagefolder(tmp_path, size=28, channels=1, test_name=test_name)
    data = load_data(folder_config(tmp_path, channels=channels), 0)
    assert data.classes == ("cat", "dog", "eel")
    assert data.train.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert data.test.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert data.train.images.pixels.shape == (18, channels, 16, 16)
    assert len(data.mean) == len(data.std) == channels


def test_imagefolder_reads_nested_images_and_ignores_other_files(tmp_path):
    make_imagefolder(tmp_path, size=(20, 31))
    nested = tmp_path / "train" / "cat" / "a" / "b"
    nested.mkdir(parents=True)
    save_image(nested / "deep.JPG", np.zeros((3, 50, 40), np.uint8))
    hidden = tmp_path / "train" / "dog" / ".thumbnails"
    hidden.mkdir()
    save_image(hidden / "x.png", np.zeros((3, 5, 5), np.uint8))
    (tmp_path / "train" / ".DS_Store").mkdir()
    (tmp_path / "train" / "dog" / "._0.png").write_bytes(b"not an image")
    (tmp_path / "train" / "dog" / "notes.txt").write_text("hello")
    (tmp_path / "train" / "README").write_text("hello")
    data = load_data(folder_config(tmp_path), 0)
    assert torch.bincount(data.train.labels).tolist() == [7, 6, 6]


def test_imagefolder_prefers_test_and_its_classes_may_be_fewer(tmp_path):
    make_imagefolder(tmp_path)
    shutil.copytree(tmp_path / "test", tmp_path / "val")
    shutil.rmtree(tmp_path / "test" / "cat")
    data = load_data(folder_config(tmp_path), 0)
    assert data.test.labels.tolist() == [1] * 3 + [2] * 3
    assert data.num_classes == 3


def remove_train(root):
    shutil.rmtree(root / "train")


def remove_test(root):
    shutil.rmtree(root / "test")


def empty_train_class(root):
    (root / "train" / "zebra").mkdir()


def empty_test_class(root):
    shutil.rmtree(root / "test" / "dog")
    (root / "test" / "dog").mkdir()


def no_classes(root):
    shutil.rmtree(root / "train")
    (root / "train").mkdir()


def one_class(root):
    shutil.rmtree(root / "train" / "cat")
    shutil.rmtree(root / "train" / "dog")


def unknown_test_class(root):
    (root / "test" / "cat").rename(root / "test" / "wolf")


def truncated_image(root):
    path = root / "train" / "eel" / "3.png"
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (remove_train, r"no train/ in dataset\.root="),
        (remove_test, r"no test/ or val/ in dataset\.root="),
        (empty_train_class, r"train/zebra has no images"),
        (empty_test_class, r"test/dog has no images"),
        (no_classes, r"train: 0 class folders found, at least 2 needed"),
        (one_class, r"train: 1 class folders found, at least 2 needed"),
        (unknown_test_class, r"test/wolf: no such class in .*train"),
        (truncated_image, r"train/eel/3\.png can't be read as an image"),
    ],
)
def test_imagefolder_errors_name_the_path(tmp_path, harm, message):
    make_imagefolder(tmp_path)
    harm(tmp_path)
    with pytest.raises(UserError, match=message):
        load_data(folder_config(tmp_path), 0)


def test_imagefolder_needs_a_size_and_a_root(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.image_size=null"):
        load_data(folder_config(tmp_path, image_size=None), 0)
    with pytest.raises(UserError, match=r"dataset=imagenet: no train/ in dataset\.root="):
        load_data(DatasetConfig(name="imagenet", root=str(tmp_path / "nowhere"), image_size=64), 0)


@pytest.mark.parametrize("extension", [".pgm", ".jfif", ".gif", ".JPE", ".tga"])
def test_images_of_less_common_formats_are_read(tmp_path, extension):
    make_imagefolder(tmp_path, channels=1)
    formats = {".pgm": "PPM", ".jfif": "JPEG", ".gif": "GIF", ".JPE": "JPEG", ".tga": "TGA"}
    for path in list(tmp_path.glob("*/cat/*.png")):
        Image.open(path).save(path.with_suffix(extension), formats[extension])
        path.unlink()
    assert torch.bincount(load_data(folder_config(tmp_path), 0).train.labels).tolist() == [6, 6, 6]


def test_a_line_counts_and_names_other_files(tmp_path):
    make_imagefolder(tmp_path)
    for name in ("train/cat/notes.txt", "train/eel/a.jxl", "test/dog/b.mat", "test/dog/c.mat"):
        (tmp_path / name).write_text("hello")
    lines = []
    load_data(folder_config(tmp_path), 0, say=lines.append)
    (line,) = [line for line in lines if "left out 4 other files" in line]
    assert "train/cat/notes.txt" in line
    assert "and 1 more" in line


@pytest.mark.parametrize("target", [".", "..", "../..", "deep"])
def test_a_link_to_a_folder_that_was_read_adds_no_image(tmp_path, target):
    make_imagefolder(tmp_path)
    deep = tmp_path / "train" / "cat" / "deep"
    deep.mkdir()
    (tmp_path / "train" / "cat" / "5.png").rename(deep / "5.png")
    (tmp_path / "train" / "cat" / "link").symlink_to(target)
    lines = []
    data = load_data(folder_config(tmp_path), 0, say=lines.append)
    assert torch.bincount(data.train.labels).tolist() == [6, 6, 6]
    assert any("train/cat/link" in line for line in lines)


def test_tinyimagenet_leaves_out_the_hidden_files_of_macos(tmp_path):
    folder = make_tinyimagenet(tmp_path, classes=3, train_per_class=5, val=4)
    for path in list(folder.glob("train/*/images/*_0.JPEG")):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    assert len(load_data(tiny_config(tmp_path), 0).train) == 15


def test_a_test_folder_without_classes_has_no_labels_so_val_is_the_test_set(tmp_path):
    make_imagefolder(tmp_path, test_name="val")
    (tmp_path / "test").mkdir()
    save_image(tmp_path / "test" / "0.png", np.zeros((3, 8, 8), np.uint8))
    assert load_data(folder_config(tmp_path), 0).test.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_class_names_may_differ_in_unicode_normalisation(tmp_path):
    make_imagefolder(tmp_path, classes=("caf\u00e9", "dog"))
    (tmp_path / "test" / "caf\u00e9").rename(tmp_path / "test" / unicodedata.normalize("NFD", "caf\u00e9"))
    data = load_data(folder_config(tmp_path), 0)
    assert data.classes == ("caf\u00e9", "dog")
    assert data.test.labels.tolist() == [0] * 3 + [1] * 3
    (tmp_path / "train" / unicodedata.normalize("NFD", "caf\u00e9")).mkdir()
    with pytest.raises(UserError, match="a second folder of class"):
        load_data(folder_config(tmp_path), 0)
