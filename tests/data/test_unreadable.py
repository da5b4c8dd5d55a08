"""Unreadable images raise an error or are skipped and counted, when decoded at the start and while training."""

import os

import pytest
import torch
from datafiles import decoded, make_imagefolder, make_tinyimagenet

from largebatch.config.batch import plan_batch
from largebatch.config.datasets import DatasetConfig
from largebatch.config.epochs import Epochs
from largebatch.data import BatchLoader, load, load_data
from largebatch.errors import UserError

BAD = ("train/cat/0.png", "train/eel/3.png", "test/dog/2.png")


@pytest.fixture(params=["decoded at the start", "decoded while training"])
def root(request, tmp_path, monkeypatch):
    if request.param == "decoded while training":
        monkeypatch.setattr(load, "host_memory", lambda: 1000)
    return make_imagefolder(tmp_path / "images")


def config(root, **options):
    return DatasetConfig(name="imagefolder", root=str(root), **{"image_size": 16, "workers": 0, **options})


def damage(root, *names):
    for name in names:
        (root / name).write_bytes((root / name).read_bytes()[:100])


def pixels(split):
    return split.images.pixels if hasattr(split.images, "pixels") else decoded(split.images)


def test_an_unreadable_image_raises_with_its_name(root):
    damage(root, BAD[0])
    for _ in range(2):  # also from the list that the first start kept
        with pytest.raises(UserError, match=r"train/cat/0\.png can't be read as an image.*dataset\.on_error=skip"):
            load_data(config(root), 0)


def test_the_error_names_the_first_unreadable_images_and_counts_all(root):
    names = [f"train/dog/{i}.png" for i in range(6)]
    damage(root, *names)
    with pytest.raises(UserError, match=r"dog/0\.png can't be read.*6 of 27 .*dog/1\.png, .* and 3 more") as caught:
        load_data(config(root), 0)
    assert "dog/5.png" not in str(caught.value)


def test_on_error_skip_skips_and_counts_unreadable_images(root):
    whole = load_data(config(root), 0)
    all_pixels = [pixels(split).clone() for split in (whole.train, whole.test)]
    damage(root, *BAD)
    for _ in range(2):
        lines = []
        data = load_data(config(root, on_error="skip"), 0, say=lines.append)
        assert data.skipped == 3
        assert "skipped 3 of 27 images, which can't be read: train/cat/0.png, train/eel/3.png, test/dog/2.png" in lines
        train, test = [i for i in range(18) if i not in (0, 15)], [i for i in range(9) if i != 5]
        assert torch.equal(pixels(data.train), all_pixels[0][train])
        assert torch.equal(pixels(data.test), all_pixels[1][test])
        assert torch.equal(data.train.labels, whole.train.labels[train])
        assert torch.equal(data.test.labels, whole.test.labels[test])
    with pytest.raises(UserError, match="3 of 27"):
        load_data(config(root), 0)


def test_a_fixed_image_is_used_again(root):
    path = root / BAD[0]
    good, stat = path.read_bytes(), path.stat()
    path.write_bytes(b"x" * len(good))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load_data(config(root, on_error="skip"), 0).skipped == 1
    path.write_bytes(good)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as if only the permissions changed
    assert load_data(config(root), 0).skipped == 0


def test_skipping_may_empty_a_class_but_not_a_split(root):
    damage(root, *(f"train/eel/{i}.png" for i in range(6)))
    data = load_data(config(root, on_error="skip"), 0)
    assert (len(data.train), data.num_classes, data.skipped) == (12, 3, 6)
    damage(root, *(f"test/{name}/{i}.png" for name in ("cat", "dog", "eel") for i in range(3)))
    with pytest.raises(UserError, match=r"no image of the test set in .* can be read"):
        load_data(config(root, on_error="skip"), 0)


def test_a_broken_link_is_an_unreadable_image(root):
    (root / BAD[0]).unlink()
    (root / BAD[0]).symlink_to("nowhere")
    with pytest.raises(UserError, match=r"train/cat/0\.png can't be read"):
        load_data(config(root), 0)
    assert load_data(config(root, on_error="skip"), 0).skipped == 1


def test_tinyimagenet_skips_unreadable_images(tmp_path):
    folder = make_tinyimagenet(tmp_path, classes=3, train_per_class=5, val=4)
    (folder / "val" / "images" / "val_1.JPEG").unlink()
    options = {"name": "tinyimagenet", "root": str(tmp_path), "download": False, "on_error": "skip"}
    data = load_data(DatasetConfig(**options), 0)
    assert (data.test.labels.tolist(), data.skipped) == ([0, 2, 0], 1)


def test_without_the_check_training_stops_at_an_unreadable_image(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "host_memory", lambda: 1000)
    root = make_imagefolder(tmp_path)
    damage(root, BAD[0])
    unchecked = config(root, verify=False, mean=[0.5] * 3, std=[0.5] * 3)
    lines = []
    data = load_data(unchecked, 0, say=lines.append)
    assert not any("checking" in line for line in lines)
    assert not (root / ".largebatch").exists()
    loader = BatchLoader(unchecked, data.mean, data.std, torch.device("cpu"), rank=0, processes=1)
    batches = loader.train(data.train, Epochs(18, 18, "carry"), plan_batch(18, 1, None), seed=0, start_step=0)
    with pytest.raises(UserError, match=r"train/cat/0\.png"):
        next(batches)


def test_the_check_logs_itself_and_the_key_to_skip_it(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "host_memory", lambda: 1000)
    root = make_imagefolder(tmp_path)
    first, second = [], []
    load_data(config(root), 0, say=first.append)
    load_data(config(root), 0, say=second.append)
    assert any("checking that 27 images can be read" in line for line in first)
    assert any("dataset.verify=false" in line for line in first)
    assert not any("checking" in line for line in second)
