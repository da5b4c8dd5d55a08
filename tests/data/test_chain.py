"""All steps of the augmentation together: the same batches for any division of the batch, and after a resume."""

import itertools

import pytest
import torch
from test_views import some_images

from largebatch.config.augmentation import (
    ColorJitterConfig,
    ErasingConfig,
    RandAugmentConfig,
    ResizedCropConfig,
    without_augmentation,
)
from largebatch.config.batch import plan_batch
from largebatch.config.datasets import DatasetConfig
from largebatch.config.epochs import Epochs
from largebatch.config.modes import Clf
from largebatch.data import BatchLoader, MemoryImages, Split
from largebatch.data.chain import Chain, draw_chain

N, CLASSES = 30, 3
EVERYTHING = {
    "shifted": {"crop_padding": 2, "rotation": 10.0},
    "resized crop": {
        "crop_padding": 0, "rotation": 0.0, "image_size": 9, "resize_size": 12,
        "resized_crop": ResizedCropConfig([0.2, 1.0]),
    },
}  # fmt: skip

STEPS_AFTER = {
    "color_jitter": ColorJitterConfig(0.4, 0.4, 0.4, 0.1, probability=0.7),
    "rand_augment": RandAugmentConfig(operations=2),
    "erasing": ErasingConfig(0.6, count=2, fill="pixel"),
}


def split(channels=3):
    return Split(MemoryImages(some_images(N, channels, 12)), torch.arange(N) % CLASSES)


def training(how, steps=2, *, rank=0, processes=1, micro_batch=12, start_step=0, per="pair", channels=3):
    config = DatasetConfig(name="x", **STEPS_AFTER, **EVERYTHING[how])
    loader = BatchLoader(config, (0.4,) * channels, (0.2,) * channels, torch.device("cpu"), rank, processes, True)
    plan = plan_batch(12, processes, micro_batch, 1, 2)
    batches = loader.train(
        split(channels), Epochs(N, 12, "carry"), plan, seed=5, start_step=start_step,
        mixing=Clf(mixup=0.8, cutmix=1.0, mix_probability=0.9, mix_per=per), classes=CLASSES,
    )  # fmt: skip
    found = list(itertools.islice(batches, steps * plan.accumulation))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("how", EVERYTHING)
@pytest.mark.parametrize("per", ["batch", "image"])
def test_micro_batches_processes_and_a_resume_give_the_same_images_and_labels(how, per):
    whole = training(how, per=per)
    assert whole[0].shape == (24, 3, *[12 if how == "shifted" else 9] * 2)
    assert whole[1].shape == (24, CLASSES)
    assert not torch.equal(whole[0][:12], whole[0][12:])
    for micro_batch in (2, 4):
        assert all(map(torch.equal, training(how, per=per, micro_batch=micro_batch), whole))
    ranks = [training(how, per=per, rank=rank, processes=2, micro_batch=6) for rank in (0, 1)]
    for both, expected in zip(zip(*ranks, strict=True), whole, strict=True):
        steps = [part for of_step in zip(*(part.chunk(2) for part in both), strict=True) for part in of_step]
        assert torch.equal(torch.cat(steps), expected)
    resumed = training(how, 1, per=per, start_step=1)
    assert all(torch.equal(got, expected[12:]) for got, expected in zip(resumed, whole, strict=True))


@pytest.mark.parametrize("how", EVERYTHING)
def test_grey_images_are_augmented_too(how):
    assert training(how, 1, channels=1)[0].isfinite().all()


@pytest.mark.parametrize("how", EVERYTHING)
def test_without_augmentation_nothing_is_drawn(how):
    config = without_augmentation(DatasetConfig(name="x", **STEPS_AFTER, **EVERYTHING[how]))
    assert draw_chain(torch.Generator(), 4, 12, config) == Chain(None)
