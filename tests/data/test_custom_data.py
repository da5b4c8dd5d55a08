"""Data sets by ``dataset.target``: the forms of data that are allowed, and one message for any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import configuration
from PIL import Image

from largebatch.data import load_data
from largebatch.errors import UserError

BYTES = torch.arange(6 * 3 * 4 * 4, dtype=torch.int64).remainder(256).to(torch.uint8).reshape(6, 3, 4, 4)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
CLASSES = ["ant", "bee", "cat"]
GIVEN: dict[str, Any] = {}


def given(form: str = "") -> Any:
    """Return what the present test gives: the target of its data set."""
    return GIVEN["data"]


def without_numbers() -> Any:
    raise IndexError("an error of the target")


def load(data: Any, *overrides: str) -> Any:
    GIVEN["data"] = data
    target = f"dataset.target={__name__}:given"
    return load_data(configuration("dataset=custom", target, *overrides).dataset, 0)


class Pairs:
    """Map-style dataset."""

    def __init__(self, images: Callable[[int], Any], labels: Any = LABELS, count: int = 6) -> None:
        self.images, self.labels, self.count = images, labels, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Any:
        return self.images(number), self.labels[number]


def picture(number: int) -> Image.Image:
    return Image.fromarray(BYTES[number].permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    "train",
    [
        (BYTES, LABELS),
        (BYTES.float() / 255, LABELS.int()),
        (BYTES.double().numpy() / 255, LABELS.numpy()),
        (BYTES.numpy(), LABELS.tolist()),
        torch.utils.data.TensorDataset(BYTES, LABELS),
        Pairs(lambda number: BYTES[number].numpy()),
        Pairs(picture, LABELS.tolist()),
        [(picture(number), number % 3) for number in range(6)],
    ],
    ids=["bytes", "floats", "arrays", "lists", "TensorDataset", "dataset", "PIL", "list of PIL"],
)
def test_every_form_gives_the_same_images(train: Any) -> None:
    data = load((train, (BYTES, LABELS), CLASSES))
    assert torch.equal(data.train.images.pixels, BYTES)
    assert torch.equal(data.train.labels, LABELS)
    assert data.train.labels.dtype == torch.long
    assert data.classes == ("ant", "bee", "cat")
    assert data.image == (3, 4, 4)
    assert data.content.digest == load(((BYTES, LABELS), (BYTES, LABELS), CLASSES)).content.digest


def test_grey_images_have_one_channel_and_images_can_be_resized() -> None:
    data = load(((BYTES[:, 0], LABELS), (BYTES[:, :1], LABELS), CLASSES), "dataset.image_size=8")
    assert data.image == (1, 8, 8)
    wide = Pairs(lambda number: Image.new("L", (20, 10), number))
    assert load((wide, wide, CLASSES), "dataset.image_size=5").image == (1, 5, 5)
    assert load((wide, wide, CLASSES), "dataset.image_size=5", "dataset.channels=3").image == (3, 5, 5)


def test_a_validation_set_is_held_out() -> None:
    data = load(((BYTES, LABELS), (BYTES, LABELS), CLASSES), "dataset.val_fraction=0.5")
    assert (len(data.train), len(data.val)) == (3, 3)


GOOD = (BYTES, LABELS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (GOOD, "returns a tuple of 2. Allowed: training data, test data and class names"),
        (None, "returns a NoneType. Allowed: training data"),
        ((GOOD, GOOD, 3), "returns 3 as class names"),
        ((GOOD, GOOD, ["one"]), "as class names. Allowed: a list of two or more texts"),
        ((BYTES, GOOD, CLASSES), "as item 0 of training data. Allowed: a pair of image and label"),
        ((GOOD, iter([]), CLASSES), "as test data. Allowed: a tuple of images and labels, or a dataset"),
        (((BYTES.int(), LABELS), GOOD, CLASSES), r"type torch.int32 from 0 to 255 .* Allowed: uint8, or floats from 0"),
        (((BYTES.float(), LABELS), GOOD, CLASSES), "type torch.float32 from 0 to 255 in training data. Allowed: uint8"),
        (((BYTES[:, :, :3], LABELS), GOOD, CLASSES), r"shape \[6, 3, 3, 4\] in training data. Allowed: square images"),
        (((BYTES.permute(0, 2, 3, 1), LABELS), GOOD, CLASSES), r"such as images.transpose\(0, 3, 1, 2\)"),
        (((BYTES, LABELS[:5]), GOOD, CLASSES), r"labels of shape \[5\] and type torch.int64 for 6 images"),
        (((BYTES, LABELS.float()), GOOD, CLASSES), "type torch.float32 for 6 images .* Allowed: an integer"),
        (((BYTES, LABELS + 1), GOOD, CLASSES), "labels from 1 to 3 in training data. Allowed: 0 to 2"),
        (((BYTES, ["ant"] * 6), GOOD, CLASSES), "has a list of 6 in training data. Allowed: tensors and arrays"),
        (((BYTES[:, :1], LABELS), GOOD, CLASSES), "training images of 1x4x4 and test images of 3x4x4. Allowed: one"),
        ((Pairs(picture, ["ant"] * 6), GOOD, CLASSES), "has a str as the label of item 0"),
        ((Pairs(lambda n: BYTES[n][:, : n + 1]), GOOD, CLASSES), r"has image 1 of shape \[3, 2, 4\] .* one shape"),
        ((Pairs(picture, count=0), GOOD, CLASSES), r"has images of shape \[0\] in training data"),
    ],
)  # fmt: skip
def test_other_data_are_one_message(data: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^dataset.target={__name__}:given: .*{message}"):
        load(data)


def test_another_number_of_channels_is_one_message() -> None:
    with pytest.raises(UserError, match=r"^dataset.channels=1: training data has 3. Fix: leave it out"):
        load((GOOD, GOOD, CLASSES), "dataset.channels=1")


def test_an_exception_of_the_target_keeps_its_traceback_and_names_the_target() -> None:
    target = f"dataset.target={__name__}:without_numbers"
    with pytest.raises(IndexError, match="an error of the target") as raised:
        load_data(configuration("dataset=custom", target).dataset, 0)
    assert raised.value.__notes__ == [target]
    with pytest.raises(ZeroDivisionError) as raised_by_item:
        load((Pairs(lambda number: 1 // 0), GOOD, CLASSES))
    assert raised_by_item.value.__notes__ == [f"dataset.target={__name__}:given"]


def test_the_example_has_stripes_and_checks() -> None:
    data = load_data(configuration("dataset=custom", "dataset.options.noise=0").dataset, 0)
    assert data.image == (1, 12, 12)
    assert [train for _, train, _ in data.content.classes] == [342, 341, 341]
    horizontal, vertical, checks = (data.train.images.pixels[label, 0].float() for label in range(3))
    assert horizontal.std(dim=1).max() == vertical.std(dim=0).max() == 0  # a row, or a column, has one colour
    assert checks.std(dim=0).min() > 0
    assert checks.std(dim=1).min() > 0
    assert np.unique(checks).tolist() == [0, 255]
