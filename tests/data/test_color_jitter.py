"""The colour jitter of classification, compared with torchvision's ``ColorJitter`` on PIL images."""

import numpy as np
import pytest
import torch
from test_views import PATHS, levels, pil_levels, some_images
from torchvision.transforms import ColorJitter

from largebatch.config.augmentation import ColorJitterConfig, ResizedCropConfig
from largebatch.config.datasets import DatasetConfig
from largebatch.data.chain import chained, draw_chain
from largebatch.data.draws import NO_STEP, draw_jitter

SIDE = 16


def drawn(n, seed=0, **options):
    return draw_jitter(torch.Generator().manual_seed(seed), n, SIDE, ColorJitterConfig(**options))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("hue", [0.0, 0.5])
def test_jittered_images_equal_torchvision_bit_for_bit(path, channels, hue):
    draws = drawn(60, brightness=0.4, contrast=2.0, saturation=0.4, hue=hue, probability=0.7)
    assert (draws.whole[:, 6:10] == NO_STEP).any().item() == (hue == 0)
    images = some_images(60, channels, SIDE)
    assert torch.equal(levels(path, images, draws), pil_levels(images, draws))


def test_factors_have_torchvisions_distribution():
    torch.manual_seed(0)
    given = {"brightness": 0.4, "contrast": 1.5, "saturation": 0.2, "hue": 0.1}
    jitter = ColorJitter(**given)
    theirs = [jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(3000)]
    ours = drawn(20_000, **given)
    for column in range(3):
        expected = torch.tensor([params[1 + column] for params in theirs])
        for moment in (torch.mean, torch.std, torch.amin, torch.amax):
            torch.testing.assert_close(moment(ours.real[:, column]), moment(expected), rtol=0.04, atol=0.01)
    hues = np.int32(np.array([params[4] for params in theirs]) * 255)
    assert ours.whole[:, 10].double().std().item() == pytest.approx(hues.std(), rel=0.04)
    orders = {tuple(order) for order in ours.whole[:, 6:10].tolist()}
    assert len(orders) == 24


@pytest.mark.parametrize("resized", [False, True], ids=["after a crop with padding", "after a resized crop"])
def test_the_jitter_follows_the_crop(resized):
    crop = {"resized_crop": ResizedCropConfig([0.3, 1.0]), "crop_padding": 0} if resized else {"crop_padding": 2}
    jitter = ColorJitterConfig(0.4, 0.4, 0.4)
    with_jitter = DatasetConfig(name="x", rotation=0.0, color_jitter=jitter, **crop)
    without = DatasetConfig(name="x", rotation=0.0, **crop)
    images, mean, std = some_images(30, 3, SIDE), torch.zeros(3), torch.full((3,), 1 / 255)
    chain, bare = (draw_chain(torch.Generator().manual_seed(3), 30, SIDE, config) for config in (with_jitter, without))
    cropped = chained(images, None, bare, mean, std, channels_last=False).round().byte()
    draws = chain.jitter if chain.jitter is not None else chain.crop
    whole = draws.whole.clone()
    whole[:, :5] = torch.tensor([0, 0, SIDE, SIDE, 0])
    expected = pil_levels(cropped, type(draws)(whole, draws.real, SIDE))
    assert torch.equal(chained(images, None, chain, mean, std, channels_last=False).round(), expected)
