"""Common parts of all data sets: validation part, statistics, presets."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import configuration
from datafiles import make_imagefolder

from largebatch.config.datasets import DATASETS, DatasetConfig, Synthetic
from largebatch.data import MemoryImages, load_data
from largebatch.data.load import measure_statistics
from largebatch.errors import UserError

PRESETS = sorted((Path(__file__).parents[2] / "conf" / "dataset").glob("*.yaml"))


def synthetic(**options):
    sizes = {"train_size": 200, "test_size": 50, "num_classes": 10, "image_size": 8}
    return Synthetic(name="synthetic", **{**sizes, **options})


def test_synthetic_is_equal_for_every_seed():
    first, second = load_data(synthetic(), seed=0), load_data(synthetic(), seed=1)
    assert first.train.images.pixels.shape == (200, 3, 8, 8)
    assert torch.bincount(first.train.labels).tolist() == [20] * 10
    assert torch.equal(first.train.images.pixels, second.train.images.pixels)
    assert not torch.equal(first.train.images.pixels[:50], first.test.images.pixels)
    assert load_data(synthetic(channels=1), 0).channels == 1


@pytest.mark.parametrize("key", ["train_size", "test_size", "num_classes", "image_size"])
def test_synthetic_needs_its_sizes(key):
    with pytest.raises(UserError, match=rf"dataset\.{key}=null"):
        load_data(synthetic(**{key: None}), 0)


def test_validation_part_is_disjoint_stratified_and_seeded():
    whole = load_data(synthetic(), 0).train
    first, again, other = (load_data(synthetic(val_fraction=0.2), seed) for seed in (0, 0, 1))
    assert (len(first.train), len(first.val), len(first.test)) == (160, 40, 50)
    assert torch.bincount(first.val.labels).tolist() == [4] * 10
    parts = [picture.numpy().tobytes() for split in (first.train, first.val) for picture in split.images.pixels]
    assert sorted(parts) == sorted(picture.numpy().tobytes() for picture in whole.images.pixels)
    assert torch.equal(first.val.images.pixels, again.val.images.pixels)
    assert not torch.equal(first.val.images.pixels, other.val.images.pixels)


@pytest.mark.parametrize(("fraction", "side"), [(0.001, "held-out part"), (0.999, "training set")])
def test_a_validation_part_that_empties_a_class_raises(fraction, side):
    said = rf"dataset\.val_fraction={fraction}: .*leaves no image of class 0, which has 20, in the {side}"
    with pytest.raises(UserError, match=said):
        load_data(synthetic(val_fraction=fraction), 0)


def test_statistics_are_configured_or_measured(tmp_path):
    data = load_data(synthetic(mean=[0.1, 0.2, 0.3]), 0)
    pixels = data.train.images.pixels.numpy() / 255
    assert data.mean == (0.1, 0.2, 0.3)
    assert data.std == pytest.approx(pixels.std(axis=(0, 2, 3)))
    make_imagefolder(tmp_path)
    from_files = load_data(DatasetConfig(name="imagefolder", root=str(tmp_path), image_size=16), 0)
    assert from_files.mean == pytest.approx((from_files.train.images.pixels.numpy() / 255).mean(axis=(0, 2, 3)))


def test_statistics_of_a_large_set_use_2000_evenly_spaced_images():
    values = (torch.arange(5000) % 256).to(torch.uint8)
    mean, std = measure_statistics(MemoryImages(values.view(-1, 1, 1, 1)), torch.arange(5000))
    chosen = values.numpy()[np.arange(2000) * 5000 // 2000] / 255
    assert mean == pytest.approx([chosen.mean()])
    assert std == pytest.approx([chosen.std()])


def test_constant_images_can_be_normalised():
    images = MemoryImages(torch.full((3, 1, 2, 2), 9, dtype=torch.uint8))
    assert measure_statistics(images, torch.arange(3))[1] == [1 / 255]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_fit_the_schema_and_their_name(path):
    preset = configuration(f"dataset={path.stem}").dataset
    assert preset.name == (path.stem if path.stem != "custom" else "stripes")
    for key in ("mean", "std"):
        assert getattr(preset, key) is None or len(getattr(preset, key)) == preset.channels


def test_every_data_set_has_a_preset():
    assert {path.stem for path in PRESETS} == {*DATASETS, "custom"}


def test_digits_and_synthetic_presets_have_the_true_sizes():
    for name in ("digits", "synthetic"):
        preset = configuration(f"dataset={name}").dataset
        data = load_data(preset, 0)
        assert (len(data.train), len(data.test)) == (preset.train_size, preset.test_size)
        assert (data.num_classes, data.channels) == (preset.num_classes, preset.channels)
        assert data.image_size == preset.image_size
