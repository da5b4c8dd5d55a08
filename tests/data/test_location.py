"""The place of pixels, which doesn't change them."""

import pytest
import torch
from datafiles import decoded, make_imagefolder

from largebatch.config.datasets import DatasetConfig
from largebatch.data import FileImages, MemoryImages, Split, load, load_data
from largebatch.data.load import choose_location, on_device

GIB = 1 << 30


@pytest.mark.parametrize(
    ("location", "size", "device_free", "host_free", "place"),
    [
        ("auto", 10, 40, 0, "device"),
        ("auto", 11, 40, 44, "host"),  # more than a quarter of the device's memory
        ("auto", 11, 40, 43, "files"),
        ("auto", 8 * GIB, 80 * GIB, 80 * GIB, "device"),
        ("auto", 8 * GIB + 1, 80 * GIB, 80 * GIB, "files"),  # more than 8 GiB
        ("auto", 10, None, 40, "host"),  # no device: its memory is the host's
        ("auto", 10, None, 39, "files"),
        ("device", 80, 100, 0, "device"),
        ("device", 100 * GIB, 130 * GIB, 20 * GIB, "device"),
        ("device", 81, 100, 324, "host"),
        ("device", 81, 100, 323, "files"),
        ("device", 10, None, 40, "host"),
        ("device", 10, None, 39, "files"),
        ("host", 10, 1000, 40, "host"),
        ("host", 11, 1000, 40, "files"),
        ("host", 9 * GIB, 1000 * GIB, 1000 * GIB, "files"),
        ("host", 10, None, 40, "host"),
    ],
)
def test_rules(location, size, device_free, host_free, place):
    assert choose_location(location, size, device_free, host_free)[0] == place
    in_memory = "host" if place == "files" else place
    assert choose_location(location, size, device_free, host_free, in_memory=True)[0] == in_memory


def test_the_reason_contains_the_sizes():
    why = choose_location("device", 9 * GIB, 10 * GIB, 20 * GIB)[1]
    assert why == (
        "9.0 GiB of pixels are more than 80 % of the device's 10.0 GiB of free memory, and more than a quarter of the "
        "host's 20.0 GiB of free memory, so images are decoded while training"
    )


@pytest.mark.parametrize("indices", [None, torch.tensor([6, 0, 3]), torch.tensor([], dtype=torch.int64)])
def test_on_device_copies_the_selection_only(monkeypatch, indices):
    monkeypatch.setattr("largebatch.data.load._PIECE_BYTES", 2 * 12)  # several pieces, the last one smaller
    pixels = torch.randint(0, 256, (7, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(MemoryImages(pixels), torch.arange(7))
    moved = on_device(split, indices, torch.device("cpu"))
    expected = split if indices is None else split.select(indices)
    assert torch.equal(moved.images.pixels, expected.images.pixels)
    assert torch.equal(moved.labels, expected.labels)
    assert moved.images.pixels.untyped_storage().nbytes() == len(moved) * 12
    assert moved.images.pixels.data_ptr() != pixels.data_ptr()


def folder_config(root, **options):
    return DatasetConfig(name="imagefolder", root=str(root), **{"image_size": 16, "workers": 0, **options})


def little_host_memory(monkeypatch):
    monkeypatch.setattr(load, "host_memory", lambda: 27 * 3 * 16 * 16 * 4 - 1)  # just below four times the images


@pytest.mark.parametrize("verify", [True, False])
def test_streamed_images_equal_images_in_memory(tmp_path, monkeypatch, verify):
    make_imagefolder(tmp_path)
    resident = load_data(folder_config(tmp_path, val_fraction=0.5), 0)
    assert resident.place == "host"
    little_host_memory(monkeypatch)
    lines = []
    streamed = load_data(folder_config(tmp_path, val_fraction=0.5, verify=verify), 0, say=lines.append)
    assert streamed.place == "files"
    assert any("decoded while training" in line for line in lines)
    assert (streamed.mean, streamed.std, streamed.skipped) == (resident.mean, resident.std, 0)
    for name in ("train", "val", "test"):
        in_files, in_memory = getattr(streamed, name), getattr(resident, name)
        assert isinstance(in_files.images, FileImages)
        assert torch.equal(decoded(in_files.images), in_memory.images.pixels)
        assert torch.equal(in_files.labels, in_memory.labels)


def test_processes_of_a_host_share_its_memory(tmp_path, monkeypatch):
    make_imagefolder(tmp_path)
    monkeypatch.setattr(load, "host_memory", lambda: 27 * 3 * 16 * 16 * 4 * 2)
    assert load_data(folder_config(tmp_path), 0, processes_here=2).place == "host"
    assert load_data(folder_config(tmp_path), 0, processes_here=3).place == "files"


def test_data_created_in_memory_stays_there(monkeypatch):
    monkeypatch.setattr(load, "host_memory", lambda: 1)
    lines = []
    assert load_data(DatasetConfig(name="digits", channels=1), 0, say=lines.append).place == "host"
    assert lines == []


def test_pixels_and_labels_go_to_the_device(tmp_path):
    make_imagefolder(tmp_path)
    data = load_data(folder_config(tmp_path, val_fraction=0.5), 0, device=torch.device("meta"))
    assert data.place == "device"
    for split in (data.train, data.val, data.test):
        assert split.images.pixels.is_meta
        assert split.labels.is_meta


@pytest.mark.parametrize("too_large", ["by free memory", "by an allocation"])
@pytest.mark.parametrize("host_room", [True, False])
def test_pixels_that_do_not_fit_on_the_device_stay_on_the_host_or_in_files(tmp_path, monkeypatch, too_large, host_room):
    make_imagefolder(tmp_path)
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"bad")
    expected = load_data(folder_config(tmp_path, on_error="skip"), 0)
    if too_large == "by free memory":
        monkeypatch.setattr(load, "free_memory", lambda device: 1)
    else:

        def out_of_memory(*arguments):  # as torch.empty, if another process took the GPU's memory
            raise torch.OutOfMemoryError

        monkeypatch.setattr(load, "on_device", out_of_memory)
    if not host_room:
        little_host_memory(monkeypatch)
    lines = []
    config = folder_config(tmp_path, on_error="skip", location="device")
    data = load_data(config, 0, device=torch.device("meta"), say=lines.append)
    assert data.place == ("host" if host_room else "files")
    assert sum("dataset.location=device" in line and "the host's" in line for line in lines) == 1
    pixels = data.train.images.pixels if host_room else decoded(data.train.images)
    assert torch.equal(pixels, expected.train.images.pixels)
    assert torch.equal(data.train.labels, expected.train.labels)
    assert data.skipped == 1
