"""The deformed digits: equal bytes everywhere, deformations against SciPy, sources apart, and not linear."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from scipy.interpolate import BSpline
from scipy.ndimage import map_coordinates
from torch import Tensor
from torch.nn.functional import one_hot

from largebatch.config.datasets import DeformedDigits
from largebatch.data import deformed_digits, load_data
from largebatch.data.deformed_digits import SIDE
from largebatch.data.load import Data
from largebatch.errors import UserError

PRESET = Path(__file__).parents[2] / "conf" / "dataset" / "deformed_digits.yaml"
COPIES = DeformedDigits.copies


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("data"))


def loaded(root: str, val_fraction: float = 0.0, seed: int = 0) -> Data:
    return load_data(DeformedDigits(name="deformed_digits", root=root, val_fraction=val_fraction), seed)


@pytest.fixture(scope="module")
def data(root: str) -> Data:
    """Make the images, which fails if their checksum differs."""
    return loaded(root)


def pixels(images: Tensor) -> Tensor:
    """Return rows of pixels in 0..1."""
    return images.flatten(1).float() / 255


def test_every_test_class_has_a_thousand_images(data: Data) -> None:
    assert (len(data.train), data.image, data.num_classes) == (60_000, (1, 16, 16), 10)
    assert torch.bincount(data.test.labels).tolist() == [1000] * 10
    sources = data.train.labels.view(-1, COPIES)
    assert (sources == sources[:, :1]).all()


def test_the_second_start_reads_what_the_first_kept(data: Data, root: str) -> None:
    lines: list[str] = []
    again = load_data(DeformedDigits(name="deformed_digits", root=root), 7, say=lines.append)
    assert lines == []
    assert torch.equal(again.train.images.pixels, data.train.images.pixels)


def test_other_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deformed_digits, "_SHIFT", 1.25)
    with pytest.raises(UserError, match="the images made here have the SHA-256"):
        loaded(str(tmp_path))
    assert [path for path in (tmp_path / ".largebatch").iterdir() if path.suffix != ".lock"] == []


def test_the_presets_statistics_are_those_of_the_training_images(data: Data) -> None:
    preset = OmegaConf.load(PRESET)
    training = data.train.images.pixels.double() / 255
    assert list(preset.mean) == [pytest.approx(training.mean().item(), abs=5e-5)]
    assert list(preset.std) == [pytest.approx(training.std().item(), abs=5e-5)]


def test_a_source_is_in_one_split_only(root: str, data: Data) -> None:
    whole = data.train.images.pixels
    held = loaded(root, val_fraction=0.1, seed=3)
    assert held.val is not None
    assert (len(held.train), len(held.val)) == (54_000, 6_000)
    assert DeformedDigits(name="deformed_digits", val_fraction=0.1).train_images == 54_000
    sources = {row.numpy().tobytes(): number // COPIES for number, row in enumerate(whole)}
    training, validation = (
        {sources[row.numpy().tobytes()] for row in split.images.pixels} for split in (held.train, held.val)
    )
    assert (len(training), len(validation)) == (1350, 150)
    assert not training & validation


def nearest(images: Tensor, others: Tensor) -> Tensor:
    return torch.cdist(pixels(images), pixels(others)).amin(1)


def test_test_images_are_as_far_from_training_images_as_other_sources_are(data: Data) -> None:
    """A near copy, such as an image with its noise drawn again, would be at a distance of 1.4."""
    train, test = data.train.images.pixels, data.test.images.pixels[::20]
    to_test = nearest(test, train)
    among = nearest(train[: 500 * COPIES : COPIES], train[500 * COPIES :])
    assert to_test.min() > 1.8
    assert to_test.median() == pytest.approx(among.median().item(), rel=0.05)


def test_a_linear_classifier_learns_almost_nothing(data: Data) -> None:
    """Strokes are lighter or darker than the background with equal probability."""
    inputs, labels = pixels(data.train.images.pixels).double() - 0.5, one_hot(data.train.labels).double()
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
    weights = torch.linalg.solve(inputs.T @ inputs + torch.eye(257, dtype=torch.float64), inputs.T @ labels)
    tested = torch.cat([pixels(data.test.images.pixels).double() - 0.5, torch.ones(10_000, 1)], 1)
    accuracy = ((tested @ weights).argmax(1) == data.test.labels).double().mean()
    assert 0.08 < accuracy < 0.2


def test_strokes_are_sampled_as_by_scipy() -> None:
    random = np.random.default_rng(0)
    sources = random.random((5, 8, 8)).astype(np.float32)
    rows, columns = random.uniform(-10, 10, (2, 5, SIDE, SIDE)).astype(np.float32)
    edge = random.uniform(0.2, 0.5, (5, 1, 1)).astype(np.float32)
    places = [(place + 7.5) / 2 - 0.25 for place in (rows.astype(np.float64), columns.astype(np.float64))]
    grey = np.stack(
        [
            map_coordinates(np.pad(source, 3), [y + 3, x + 3], order=1)
            for source, y, x in zip(sources, *places, strict=True)
        ]
    )
    expected = np.clip((grey - edge) * 2 + 0.5, 0, 1)
    np.testing.assert_allclose(deformed_digits._strokes(sources, rows, columns, edge), expected, atol=1e-5)


def test_elastic_displacements_are_quadratic_splines() -> None:
    points = np.random.default_rng(0).standard_normal((3, 6, 6)).astype(np.float32)
    places = (np.arange(SIDE) + 0.5) / 4
    along = BSpline(np.arange(-2, 7), np.eye(6), 2)(places)
    expected = np.einsum("yk,nkl,xl->nyx", along, points.astype(np.float64), along)
    np.testing.assert_allclose(deformed_digits._elastic(points), expected, atol=1e-5)
