"""The digits, compared with scikit-learn's own loader."""

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from largebatch.config.datasets import DatasetConfig
from largebatch.data import load_data
from largebatch.errors import UserError

CONFIG = DatasetConfig(name="digits", channels=1)
PRESETS = Path(__file__).parents[2] / "conf" / "dataset"


@pytest.fixture(scope="module")
def data():
    return load_data(CONFIG, seed=0)


def test_images_and_labels_equal_scikit_learns(data):
    from sklearn.datasets import load_digits

    original = load_digits()
    expected = sorted(
        (int(label), np.array([round(x * 255 / 16) for x in image.ravel()], dtype=np.uint8).tobytes())
        for image, label in zip(original.images, original.target, strict=True)
    )
    got = sorted(
        (int(label), image.numpy().tobytes())
        for split in (data.train, data.test)
        for image, label in zip(split.images.pixels, split.labels, strict=True)
    )
    assert got == expected


def test_the_split_is_stratified_and_equal_for_every_seed(data):
    assert (len(data.train), len(data.test), data.val) == (1437, 360, None)
    assert (data.num_classes, data.channels, data.image_size) == (10, 1, 8)
    whole = torch.bincount(torch.cat([data.train.labels, data.test.labels]))
    assert (torch.bincount(data.test.labels) - whole * 360 / 1797).abs().max() < 1
    again = load_data(CONFIG, seed=7)
    assert torch.equal(again.test.images.pixels, data.test.images.pixels)


def test_the_presets_statistics_are_those_of_the_training_images(data):
    preset = OmegaConf.load(PRESETS / "digits.yaml")
    pixels = data.train.images.pixels.double().numpy() / 255
    assert list(preset.mean) == [pytest.approx(pixels.mean(), abs=5e-5)]
    assert list(preset.std) == [pytest.approx(pixels.std(), abs=5e-5)]
    assert data.mean == (pytest.approx(pixels.mean()),)  # measured, because the configuration has none
    assert data.std == (pytest.approx(pixels.std()),)


def test_a_damaged_file_raises_with_its_name(tmp_path, monkeypatch):
    package = importlib.util.find_spec("sklearn").submodule_search_locations[0]
    bad = tmp_path / "datasets" / "data" / "digits.csv.gz"
    bad.parent.mkdir(parents=True)
    bad.write_bytes((Path(package) / "datasets" / "data" / "digits.csv.gz").read_bytes()[:1000])
    spec = ModuleSpec("sklearn", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with pytest.raises(UserError, match=r"digits\.csv\.gz"):
        load_data(CONFIG, 0)
