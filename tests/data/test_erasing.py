"""Random erasing, compared with timm's ``RandomErasing``."""

import random

import pytest
import torch
from timm.data.random_erasing import RandomErasing

from largebatch.config.augmentation import ErasingConfig
from largebatch.data.erasing import draw_erasing, erased

SIDE = 24


def drawn(n, seed=0, **options):
    config = ErasingConfig(**{"probability": 1.0, **options})
    return draw_erasing(torch.Generator().manual_seed(seed), n, SIDE, config)


@pytest.mark.parametrize(
    "options",
    [
        {"probability": 0.4},
        {"min_area": 0.1, "max_area": 0.2, "min_aspect": 0.5},
        {"count": 3},
        {"min_area": 0.6, "max_area": 1.0},  # some of ten attempts don't fit
    ],
    ids=["probability", "areas", "several boxes", "large boxes"],
)
def test_boxes_have_timms_distribution(options):
    options = {"probability": 1.0, "min_area": 0.02, "max_area": 1 / 3, "min_aspect": 0.3, "count": 1, **options}
    theirs = RandomErasing(
        options["probability"], options["min_area"], options["max_area"], options["min_aspect"],
        min_count=options["count"], max_count=options["count"], device="cpu",
    )  # fmt: skip
    random.seed(0)
    expected = theirs(torch.ones(3000, 1, SIDE, SIDE)) == 0
    got = erased(torch.ones(3000, 1, SIDE, SIDE), drawn(3000, **options)) == 0
    for part in (expected, got):
        assert part.any()
    areas = [part.double().mean((1, 2, 3)) for part in (got, expected)]
    torch.testing.assert_close(*[area.mean() for area in areas], rtol=0.08, atol=0.005)
    torch.testing.assert_close(*[area.std() for area in areas], rtol=0.1, atol=0.005)
    torch.testing.assert_close(*[part.double().mean(0) for part in (got, expected)], rtol=0, atol=0.06)
    extents = [part.any(axis).double().sum(-1).mean() for part in (got, expected) for axis in (2, 3)]
    torch.testing.assert_close(extents[0], extents[2], rtol=0.06, atol=0.05)
    torch.testing.assert_close(extents[1], extents[3], rtol=0.06, atol=0.05)


def test_only_the_box_is_filled():
    images = torch.randn(50, 3, SIDE, SIDE).add(10)
    draws = drawn(50)
    for image, filled, [box] in zip(images, erased(images, draws), draws.boxes.tolist(), strict=True):
        top, left, height, width = box
        expected = image.clone()
        expected[:, top : top + height, left : left + width] = 0
        assert torch.equal(filled, expected)


@pytest.mark.parametrize("fill", ["channel", "pixel"])
def test_noise_is_normal_and_a_function_of_the_image_alone(fill):
    images = torch.full((400, 3, SIDE, SIDE), 9.0)
    draws = drawn(400, fill=fill, min_area=0.2)
    filled = erased(images, draws)
    inside = filled != 9
    assert torch.equal(erased(images[100:], draws[100:]), filled[100:])
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(erased(last, draws), filled)
    assert erased(last, draws).is_contiguous(memory_format=torch.channels_last)
    noise = filled[inside] if fill == "pixel" else filled.where(inside, torch.nan).nanmean((2, 3)).flatten()
    assert abs(noise.mean()) < 0.1
    assert noise.std() == pytest.approx(1, abs=0.06)
    values = [image[where].unique().numel() for image, where in zip(filled, inside, strict=True)]
    assert (max(values) <= 3) == (fill == "channel")
    assert len({image.numpy().tobytes() for image in filled}) == 400
