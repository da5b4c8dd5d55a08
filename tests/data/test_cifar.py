"""CIFAR in its true file format, and errors in the files."""

import hashlib
import io
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from datafiles import make_cifar10, make_cifar100, python2_pickle

from largebatch.config.datasets import DatasetConfig
from largebatch.data import cifar, load_data
from largebatch.errors import UserError


def config(root, name="cifar10", **options):
    return DatasetConfig(name=name, root=str(root), **{"verify": False, "download": False, **options})


@pytest.fixture
def cifar10(tmp_path):
    return make_cifar10(tmp_path)


@pytest.mark.parametrize(("name", "make"), [("cifar10", make_cifar10), ("cifar100", make_cifar100)])
def test_images_labels_and_classes_equal_torchvisions(tmp_path, monkeypatch, name, make):
    """The reference is torchvision's own class without its checksums."""
    import torchvision.datasets

    make(tmp_path)
    reference_class = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    monkeypatch.setattr(reference_class, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    data = load_data(config(tmp_path, name), seed=0)
    for train, split in ((True, data.train), (False, data.test)):
        reference = reference_class(tmp_path, train=train)
        assert np.array_equal(split.images.pixels.permute(0, 2, 3, 1).numpy(), reference.data)
        assert split.labels.tolist() == reference.targets
    assert list(data.classes) == reference.classes
    assert (data.channels, data.image_size) == (3, 32)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_file_names_and_checksums_are_torchvisions(name):
    import torchvision.datasets

    published = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    ours = cifar.ARCHIVES[name]
    assert (ours.url, ours.md5, ours.folder) == (published.url, published.tgz_md5, published.base_folder)
    assert list(ours.train.items()) == [tuple(entry) for entry in published.train_list]
    assert list(ours.test.items()) == [tuple(entry) for entry in published.test_list]
    assert ours.meta == {published.meta["filename"]: published.meta["md5"]}
    assert ours.names_key == published.meta["key"]


def test_root_may_be_the_folder_itself(cifar10):
    assert len(load_data(config(cifar10), 0).train) == 100


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_files_pickled_by_python_3_are_read(cifar10, protocol):
    pixels = np.arange(2 * 3072, dtype=np.uint64).astype(np.uint8).reshape(2, 3072)
    entry = {b"data": pixels, b"labels": [np.int64(3), np.int64(9)]}
    (cifar10 / "test_batch").write_bytes(pickle.dumps(entry, protocol=protocol))
    test = load_data(config(cifar10), 0).test
    assert test.labels.tolist() == [3, 9]
    assert np.array_equal(test.images.pixels.flatten(1).numpy(), pixels)


def test_checksums_are_compared(cifar10, monkeypatch):
    files = [path for path in cifar10.iterdir() if path.is_file()]
    md5s = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in files}
    published = cifar.ARCHIVES["cifar10"]
    of_these = replace(
        published,
        train={name: md5s[name] for name in published.train},
        test={name: md5s[name] for name in published.test},
        meta={name: md5s[name] for name in published.meta},
    )
    monkeypatch.setitem(cifar.ARCHIVES, "cifar10", of_these)
    assert len(load_data(config(cifar10, verify=True), 0).train) == 100

    damaged = bytearray((cifar10 / "data_batch_3").read_bytes())
    damaged[-1000] ^= 1
    (cifar10 / "data_batch_3").write_bytes(damaged)
    with pytest.raises(UserError, match=r"data_batch_3 isn't the published file.*dataset\.verify=false"):
        load_data(config(cifar10, verify=True), 0)


def test_missing_files_without_download_raise(tmp_path):
    with pytest.raises(UserError, match=r"(?s)dataset\.download=false.*dataset\.root=.*data_batch_1") as caught:
        load_data(config(tmp_path / "nowhere"), 0)
    assert not (tmp_path / "nowhere").exists()
    make_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(UserError, match="missing: data_batch_4") as caught:
        load_data(config(tmp_path), 0)
    assert "data_batch_5" not in str(caught.value).split("missing:")[1]


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_truncated_file_raises_with_its_name(cifar10, keep):
    path = cifar10 / "data_batch_2"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="data_batch_2 isn't a usable CIFAR file"):
        load_data(config(cifar10), 0)


def good_entry():
    return {"data": np.zeros((4, 3072), np.uint8), "labels": [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": None}, "uint8 array of n x 3072 and is NoneType"),
        ({"data": np.zeros((4, 3072), np.float32)}, "is float32"),
        ({"data": np.zeros((4, 1024), np.uint8)}, r"\(4, 1024\)"),
        ({"data": np.zeros((0, 3072), np.uint8), "labels": []}, "at least one"),
        ({"labels": [0, 1]}, "one integer for each of its 4 images"),
        ({"labels": [0, 1, 2, "x"]}, "one integer"),
        ({"labels": [0, 1, 2, 10]}, r"outside 0\.\.9"),
        ({"labels": [0, 1, 2, -1]}, r"outside 0\.\.9"),
    ],
)
def test_wrong_contents_raise_with_the_reason(cifar10, change, message):
    (cifar10 / "data_batch_1").write_bytes(python2_pickle({**good_entry(), **change}))
    with pytest.raises(UserError, match=f"data_batch_1 isn't a usable CIFAR file.*{message}"):
        load_data(config(cifar10), 0)


def test_wrong_keys_raise_with_their_names(cifar10):
    (cifar10 / "test_batch").write_bytes(python2_pickle({"images": 1, "fine_labels": [0]}))
    with pytest.raises(UserError, match=r"test_batch.*'data' and 'labels'.*fine_labels, images"):
        load_data(config(cifar10), 0)
    (cifar10 / "test_batch").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(UserError, match="list instead of a dict"):
        load_data(config(cifar10), 0)
    (cifar10 / "batches.meta").write_bytes(python2_pickle({"label_names": "cat"}))
    with pytest.raises(UserError, match=r"batches\.meta.*no list of class names"):
        load_data(config(cifar10), 0)


def test_a_pickle_cannot_run_code(cifar10, tmp_path):
    class Attack:
        def __reduce__(self):
            return (io.open, (str(tmp_path / "attacked"), "w"))

    (cifar10 / "data_batch_1").write_bytes(pickle.dumps({**good_entry(), "extra": Attack()}))
    with pytest.raises(UserError, match=r"data_batch_1.*needs _?io\.open"):
        load_data(config(cifar10), 0)
    assert not (tmp_path / "attacked").exists()


def test_other_sizes(cifar10):
    data = load_data(config(cifar10, image_size=16), 0)
    assert data.train.images.pixels.shape == (100, 3, 16, 16)
    assert data.train.images.pixels.dtype == torch.uint8
