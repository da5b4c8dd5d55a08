"""Random resized crops and the crops of evaluations, compared with torchvision on PIL images."""

from random import Random

import pytest
import torch
from datafiles import make_imagefolder
from PIL import Image
from test_views import PATHS, levels, some_images
from torchvision.transforms import CenterCrop, InterpolationMode, RandomResizedCrop, Resize, functional

from largebatch.config.augmentation import ResizedCropConfig
from largebatch.config.datasets import DatasetConfig, ImageFolder
from largebatch.data import BatchLoader, augment, load_data
from largebatch.data.draws import draw_resized_crop
from largebatch.data.file_crops import random_box

TORCH = pytest.param(augment.augmented_torch, id="torch")


def drawn(n, side, image_size=None, seed=0, **options):
    resized_crop = ResizedCropConfig(**{"scale": [0.08, 1.0], **options})
    resize_size = None if image_size is None else side
    config = DatasetConfig(name="x", image_size=image_size, resize_size=resize_size, resized_crop=resized_crop)
    return draw_resized_crop(torch.Generator().manual_seed(seed), n, side, config)


def by_torchvision(images, draws):
    mode, results = InterpolationMode(draws.interpolation), []
    for image, (top, left, height, width, flip, *_) in zip(images, draws.whole.tolist(), strict=True):
        pil = functional.to_pil_image(image)
        pil = functional.resized_crop(pil, top, left, height, width, [draws.side, draws.side], mode)
        results.append(functional.pil_to_tensor(functional.hflip(pil) if flip else pil))
    return torch.stack(results).float()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("side", "channels"), [(8, 1), (33, 3)])
def test_crops_equal_torchvision_bit_for_bit(path, interpolation, side, channels):
    images, draws = some_images(40, channels, side), drawn(40, side, interpolation=interpolation)
    assert set(draws.whole[:, 4].tolist()) == {0, 1}
    assert torch.equal(levels(path, images, draws), by_torchvision(images, draws))


@pytest.mark.parametrize("path", [TORCH, pytest.param(augment.augmented, id="chosen")])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("side", "image_size"), [(40, 32), (33, 12)])
def test_crops_that_shrink_are_antialiased_as_torchvision_does(path, interpolation, side, image_size):
    images, draws = some_images(40, 3, side), drawn(40, side, image_size, interpolation=interpolation)
    got = levels(path, images, draws)
    assert got.shape == (40, 3, image_size, image_size)
    assert torch.equal(got, by_torchvision(images, draws))


@pytest.mark.parametrize(
    ("scale", "ratio"),
    [([0.35, 1.0], [3 / 4, 4 / 3]), ([0.9, 1.0], [0.5, 2.0]), ([0.8, 1.0], [0.2, 0.25]), ([0.8, 1.0], [4.0, 5.0])],
    ids=["usual", "some don't fit", "none fits, narrow", "none fits, wide"],
)
def test_crops_have_torchvisions_distribution(scale, ratio):
    """A crop that doesn't fit in ten attempts is in the centre, with the nearest ratio."""
    torch.manual_seed(0)
    side, image = 32, torch.empty(3, 32, 32)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(2000)]).double()
    ours = drawn(20_000, side, scale=scale, ratio=ratio).whole[:, :4].double()
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), rtol=0, atol=0.02 * side)
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.08, atol=0.05)


@pytest.mark.parametrize("ratio", [[20, 50], [1 / 50, 1 / 20]])
def test_a_crop_of_a_ratio_that_no_pixels_have_is_one_pixel_thin(ratio):
    """torchvision then fails, because its crop is empty."""
    height, width = drawn(50, 8, scale=[0.5, 1], ratio=ratio).whole[:, 2:4].unbind(1)
    assert {(int(h), int(w)) for h, w in zip(height, width, strict=True)} == {(1, 8) if ratio[0] > 1 else (8, 1)}
    left, top, right, bottom = random_box(Random(0), 8, 8, (0.5, 1.0), tuple(ratio))
    assert (bottom - top, right - left) == ((1, 8) if ratio[0] > 1 else (8, 1))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = make_imagefolder(tmp_path_factory.mktemp("tree"), size=30, train_per_class=6)
    for number, path in enumerate(sorted(root.glob("*/*/*.png"))):  # images that aren't square
        generator = torch.Generator().manual_seed(number)
        shape = (3, 30 + number % 7, 41)
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        functional.to_pil_image(pixels).save(path)
    return root


@pytest.mark.parametrize("location", ["host", "files"])
def test_evaluations_resize_and_crop_the_centre_as_torchvision(tree, location, monkeypatch):
    if location == "files":
        monkeypatch.setattr("largebatch.data.load.choose_location", lambda *_, **__: ("files", "no memory"))
    config = ImageFolder(
        name="imagefolder", root=str(tree), image_size=16, resize_size=20, val_fraction=0.34, workers=0
    )
    data = load_data(config, seed=0)
    assert data.place == location
    assert data.image == (3, 16, 16)
    transform = torch.nn.Sequential(Resize(20), CenterCrop(16))
    expected = {
        functional.pil_to_tensor(transform(Image.open(path))).numpy().tobytes() for path in tree.glob("*/*/*.png")
    }
    loader = BatchLoader(config, (0.0,) * 3, (1 / 255,) * 3, torch.device("cpu"), 0, 1)
    for split in (data.val, data.test):
        for images, _ in loader.evaluate(split, 4):
            assert images.shape[1:] == (3, 16, 16)
            assert {image.round().byte().numpy().tobytes() for image in images} <= expected
