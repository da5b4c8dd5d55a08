"""RandAugment, compared with torchvision's operations on PIL images."""

import pytest
import torch
from test_views import some_images
from torchvision.transforms import InterpolationMode, RandAugment, functional
from torchvision.transforms.autoaugment import _apply_op

from largebatch.config.augmentation import RandAugmentConfig
from largebatch.data.rand_augment import OPERATIONS, OpDraws, draw_operations, operated


def by_torchvision(image, name, magnitude):
    pil = _apply_op(functional.to_pil_image(image), name, magnitude, InterpolationMode.NEAREST, None)
    return functional.pil_to_tensor(pil)


def special_images(channels, side):
    """Return images of one level, of two levels, dark and bright images, besides usual images."""
    images = some_images(8, channels, side)
    images[0], images[1] = 7, torch.where(images[1] < 100, 3, 250)
    images[2], images[3] = images[2] // 4, 255 - images[3] // 3
    return images


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (32, 3), (33, 3)])
@pytest.mark.parametrize("kind", range(len(OPERATIONS)), ids=[name for name, *_ in OPERATIONS])
def test_each_operation_equals_torchvision_at_every_magnitude(kind, side, channels):
    name, magnitudes, _ = OPERATIONS[kind]
    expected, signed = RandAugment()._augmentation_space(31, (side, side))[name]
    images = special_images(channels, side)
    for bin_, magnitude in enumerate(magnitudes(side)):
        assert magnitude == (expected[bin_].item() if expected.ndim else 0.0)
        for sign in (1, -1) if signed else (1,):
            draws = OpDraws(bin_, torch.full((8, 1), kind), torch.full((8, 1), sign < 0))
            got = operated(images.clone(), draws)
            assert got.dtype == torch.uint8
            for ours, image in zip(got, images, strict=True):
                assert torch.equal(ours, by_torchvision(image, name, sign * magnitude)), (magnitude, sign)


def test_the_operations_are_torchvisions_in_its_order():
    assert [name for name, *_ in OPERATIONS] == list(RandAugment()._augmentation_space(31, (8, 8)))


def test_operations_follow_each_other():
    images = some_images(60, 3, 16)
    draws = draw_operations(torch.Generator().manual_seed(0), 60, RandAugmentConfig(operations=2))
    for image, got, kinds, negative in zip(
        images, operated(images.clone(), draws), draws.kinds.tolist(), draws.negative.tolist(), strict=True
    ):
        for kind, minus in zip(kinds, negative, strict=True):
            name, magnitudes, _ = OPERATIONS[kind]
            signed = RandAugment()._augmentation_space(31, (16, 16))[name][1]
            image = by_torchvision(image, name, magnitudes(16)[9] * (-1 if minus and signed else 1))
        assert torch.equal(got, image)


def test_a_part_of_the_batch_gets_its_part_of_the_draws():
    images = some_images(40, 3, 12)
    draws = draw_operations(torch.Generator().manual_seed(0), 40, RandAugmentConfig(operations=3, magnitude=20))
    parts = [operated(images[part].clone(), draws[part]) for part in (slice(0, 13), slice(13, 40))]
    assert torch.equal(operated(images.clone(), draws), torch.cat(parts))


def test_operations_and_signs_are_uniform():
    draws = draw_operations(torch.Generator().manual_seed(0), 14_000, RandAugmentConfig(operations=2))
    counts = torch.bincount(draws.kinds.flatten(), minlength=14)
    assert counts.min() > 1800
    assert counts.max() < 2200
    assert draws.negative.double().mean() == pytest.approx(0.5, abs=0.02)
