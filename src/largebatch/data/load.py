"""From the configuration to images in memory (or their files), classes and statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from largebatch.config import DatasetConfig
from largebatch.data.cifar import load_cifar
from largebatch.data.digits import load_digits
from largebatch.data.imagefolder import load_imagefolder
from largebatch.data.images import Images, MemoryImages, resize
from largebatch.data.split import Split, hold_out
from largebatch.data.stream import stream
from largebatch.data.synthetic import load_synthetic
from largebatch.data.tinyimagenet import load_tinyimagenet
from largebatch.errors import UserError, choices
from largebatch.seeding import derive_seed

Loaded = tuple[Split, Split, tuple[str, ...]]  # training set, test set, names of the classes
_LOADERS: dict[str, Callable[[DatasetConfig], Loaded]] = {
    "digits": load_digits,
    "cifar10": load_cifar,
    "cifar100": load_cifar,
    "tinyimagenet": load_tinyimagenet,
    "imagefolder": load_imagefolder,
    "imagenet": load_imagefolder,
    "synthetic": load_synthetic,
}
_MEASURED_IMAGES = 2000


@dataclass(frozen=True)
class Data:
    """A data set: its splits, class names by label, and per-channel statistics of pixels in 0..1."""

    train: Split
    val: Split | None
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def channels(self) -> int:
        return self.train.images.channels

    @property
    def image_size(self) -> int:
        return self.train.images.image_size


def load_data(config: DatasetConfig, seed: int) -> Data:
    """Load the data set ``config.name``, downloading it where that is allowed and needed.

    ``config.val_fraction`` of the training set is held out, stratified, as ``seed`` has it; the test set is never
    touched. Sizes and numbers of classes are what the files hold; the configuration's are for the launcher only.

    Raises:
        UserError: when files are missing, damaged or not what the configuration says; it names the file or key.
    """
    if config.name not in _LOADERS:
        raise UserError(f"dataset.name={config.name}: {choices(config.name, _LOADERS)}")
    try:
        train, test, classes = _LOADERS[config.name](config)
    except OSError as error:  # for example a folder that one may not read
        raise UserError(f"dataset={config.name}: {error}; look at dataset.root={config.root}") from error
    if train.images.channels != config.channels:
        raise UserError(
            f"dataset.channels={config.channels}: the images of {config.name} have {train.images.channels}; "
            "only imagefolder, imagenet and synthetic can have another number"
        )
    train, test = _at_size(train, config.image_size), _at_size(test, config.image_size)
    train, val = _validation_split(train, config.val_fraction, seed)
    mean, std = config.mean, config.std
    if mean is None or std is None:
        measured_mean, measured_std = measure_statistics(train.images, config.workers)
        mean, std = mean or measured_mean, std or measured_std
    return Data(train, val, test, classes, tuple(mean), tuple(std))


def measure_statistics(images: Images, workers: int = 0) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, for pixels in 0..1, over up to 2000 evenly spaced images.

    A channel that is the same everywhere gets 1/255 as its deviation, so that one can divide by it.
    """
    count = min(len(images), _MEASURED_IMAGES)
    parts = torch.split(torch.arange(count) * len(images) // count, 256)
    total = torch.zeros(images.channels, dtype=torch.float64)
    squares = torch.zeros(images.channels, dtype=torch.float64)
    for pixels in stream(images, parts, batch=256, workers=workers):
        scaled = pixels.double().div_(255).transpose(0, 1).flatten(1)
        total += scaled.sum(1)
        squares += scaled.square().sum(1)
    pixels_a_channel = count * images.image_size**2
    mean = total / pixels_a_channel
    std = (squares / pixels_a_channel - mean.square()).clamp(min=0).sqrt().clamp(min=1 / 255)
    return mean.tolist(), std.tolist()


def _at_size(split: Split, image_size: int | None) -> Split:
    images = split.images
    if image_size is None or image_size == images.image_size or not isinstance(images, MemoryImages):
        return split
    return Split(resize(images, image_size), split.labels)


def _validation_split(train: Split, fraction: float, seed: int) -> tuple[Split, Split | None]:
    if fraction == 0:
        return train, None
    count = len(train) - round(len(train) * (1 - fraction))  # as the launcher counts
    try:
        kept, held = hold_out(train.labels, count, derive_seed(seed, "validation"))
    except UserError as error:
        raise UserError(f"dataset.val_fraction={fraction}: {error}") from None
    return train.select(kept), train.select(held)
