"""The batched augmentation against torchvision's PIL functions."""

import numpy as np
import pytest
import torch
from PIL import Image

from largebatch.data import augment
from largebatch.data.augment import Draws


def random_images(n, channels, side, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8, generator=generator)


def draws_for(n, seed=1, **options):
    return augment.draw(torch.Generator().manual_seed(seed), n, **options)


def pil_chain(image, draws, i):
    """RandomCrop(S, padding) -> RandomHorizontalFlip -> RandomRotation, with the i-th draw's parameters."""
    from torchvision.transforms import functional

    side = image.shape[-1]
    array = image.permute(1, 2, 0).numpy()
    pil = Image.fromarray(array[..., 0] if len(image) == 1 else array)
    pil = functional.crop(functional.pad(pil, draws.padding), int(draws.top[i]), int(draws.left[i]), side, side)
    if draws.flip[i]:
        pil = functional.hflip(pil)
    array = np.array(functional.rotate(pil, float(draws.angle[i])))
    return torch.from_numpy(array).view(side, side, -1).permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("side", "padding", "rotation"), [(8, 1, 10), (32, 4, 15), (64, 4, 15), (33, 0, 180)])
def test_equals_the_pil_chain(side, padding, rotation, channels):
    """Below 0.1 % of 200 images' pixels differ from PIL's, at equal parameters."""
    images = random_images(200, channels, side)
    draws = draws_for(200, padding=padding, flip=True, rotation=rotation)
    got = augment.apply(images, draws)
    expected = torch.stack([pil_chain(images[i], draws, i) for i in range(200)])
    assert got.dtype == torch.uint8
    assert got.shape == images.shape
    assert (got != expected).any(1).double().mean() < 0.001


def test_what_the_rotation_brings_in_is_black_even_where_the_padded_image_has_pixels():
    white = torch.full((1, 1, 32, 32), 255, dtype=torch.uint8)
    draws = Draws(
        4, torch.tensor([0]), torch.tensor([0]), torch.tensor([False]), torch.tensor([45.0], dtype=torch.float64)
    )
    got = augment.apply(white, draws)[0, 0]
    # Pixel (28, 28) comes from row 33.7, column 16 of the crop: below it, but row 29.7 of the white image.
    assert got[28, 28] == 0
    assert got[26, 26] == 255  # row 30.8


def test_nothing_drawn_changes_nothing():
    images = random_images(5, 3, 16)
    same = augment.apply(images, draws_for(5, padding=0, flip=False, rotation=0))
    assert torch.equal(same, images)


def test_equal_images_in_a_batch_get_different_draws():
    image = random_images(1, 3, 32).expand(64, -1, -1, -1)
    got = augment.apply(image, draws_for(64, padding=4, flip=True, rotation=15))
    assert len({picture.numpy().tobytes() for picture in got}) == 64


def test_draws_cover_their_ranges():
    draws = draws_for(20_000, padding=2, flip=True, rotation=15)
    for corner in (draws.top, draws.left):
        assert torch.bincount(corner).tolist() == pytest.approx([4000] * 5, rel=0.1)
    assert draws.flip.double().mean() == pytest.approx(0.5, abs=0.02)
    assert draws.angle.min() == pytest.approx(-15, abs=0.05)
    assert draws.angle.max() == pytest.approx(15, abs=0.05)
    assert draws.angle.mean() == pytest.approx(0, abs=0.2)
    assert torch.corrcoef(torch.stack([draws.top.double(), draws.left.double()]))[0, 1].abs() < 0.03


def test_a_part_of_the_batch_gets_its_part_of_the_draws():
    """Also where the batch is so large that it is taken in slices."""
    images = random_images(1100, 1, 8)
    draws = draws_for(1100, padding=1, flip=True, rotation=10)
    whole = augment.apply(images, draws)
    parts = [augment.apply(images[part], draws[part]) for part in (slice(0, 700), slice(700, 1100))]
    assert torch.equal(whole, torch.cat(parts))


def test_normalise_is_scalar_arithmetic():
    images = random_images(2, 3, 4)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.25, 0.3)
    got = augment.normalise(images, mean, std)
    assert got.dtype == torch.float32
    for c in range(3):
        expected = (images[:, c].double() / 255 - mean[c]) / std[c]
        torch.testing.assert_close(got[:, c].double(), expected, rtol=1e-5, atol=1e-5)
