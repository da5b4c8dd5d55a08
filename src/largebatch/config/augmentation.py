"""Options of the augmentation that is off by default: ``docs/augmentation.md``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from largebatch.config.options import option

if TYPE_CHECKING:
    from largebatch.config.datasets import DatasetConfig


@dataclass
class ResizedCropConfig:
    """torchvision's ``RandomResizedCrop``. It takes the place of crop with padding and rotation."""

    scale: list[float] | None = option(None, above=0, most=1, length=2)  # [0.08, 1]: parts of the area; None: off
    ratio: list[float] = option([3 / 4, 4 / 3], above=0, length=2)  # of width to height
    interpolation: str = option("bicubic", allowed=("bicubic", "bilinear"))
    # square: crops from the decoded square. file: crops from the whole file, while it is decoded; of views too.
    source: str = option("square", allowed=("square", "file"))

    @property
    def is_on(self) -> bool:
        return self.scale is not None


@dataclass
class ColorJitterConfig:
    """torchvision's ``ColorJitter``, applied to an image with a probability."""

    brightness: float = option(0.0, least=0, most=10)  # factors from 1 - brightness, at least 0, to 1 + brightness
    contrast: float = option(0.0, least=0, most=10)
    saturation: float = option(0.0, least=0, most=10)
    hue: float = option(0.0, least=0, most=0.5)  # shift to either side, in turns of the colour circle
    probability: float = option(1.0, least=0, most=1)  # of an image

    @property
    def is_on(self) -> bool:
        return self.probability > 0 and max(self.brightness, self.contrast, self.saturation, self.hue) > 0


@dataclass
class RandAugmentConfig:
    """torchvision's ``RandAugment``, with 31 bins of magnitudes, nearest pixels and black outside."""

    operations: int = option(0, least=0, most=14)  # random operations of an image, one after the other; 0: off
    magnitude: int = option(9, least=0, most=30)

    @property
    def is_on(self) -> bool:
        return self.operations > 0


@dataclass
class ErasingConfig:
    """timm's ``RandomErasing``, after the normalisation."""

    probability: float = option(0.0, least=0, most=1)  # of an image; 0: off
    min_area: float = option(0.02, above=0, most=1)  # parts of the image's area
    max_area: float = option(1 / 3, above=0, most=1)
    min_aspect: float = option(0.3, above=0, most=1)  # of height to width; the largest is its inverse
    count: int = option(1, least=1, most=16)  # boxes, which share the area
    # zero: the mean of the data set; channel: one normal number per channel; pixel: normal noise
    fill: str = option("zero", allowed=("zero", "channel", "pixel"))

    @property
    def is_on(self) -> bool:
        return self.probability > 0


def augmentation_problems(dataset: DatasetConfig, views: int = 1) -> list[str]:
    """Return one line for each conflict between options of the augmentation; ``views`` are the mode's."""
    problems = []
    crop, side = dataset.resized_crop, dataset.image_size
    for key, ends in {"scale": crop.scale, "ratio": crop.ratio}.items():
        if ends is not None and len(ends) == 2 and ends[0] > ends[1]:
            problems.append(f"dataset.resized_crop.{key}={ends}: must be [smallest, largest]. Fix: {ends[::-1]}")
    if crop.scale is not None and (dataset.crop_padding or dataset.rotation):
        problems.append(
            f"dataset.resized_crop.scale={crop.scale}: not allowed with dataset.crop_padding={dataset.crop_padding} "
            f"dataset.rotation={dataset.rotation:g}, because it replaces this crop and the rotation. "
            "Fix: dataset.crop_padding=0 dataset.rotation=0"
        )
    if crop.source == "file":
        problems += _file_crop_problems(dataset, views)
    erasing = dataset.erasing
    if erasing.min_area > erasing.max_area:
        problems.append(
            f"dataset.erasing.min_area={erasing.min_area:g}: larger than dataset.erasing.max_area="
            f"{erasing.max_area:g}. Fix: at most {erasing.max_area:g}"
        )
    if dataset.resize_size is not None and (side is None or dataset.resize_size < side):
        problems.append(
            f"dataset.resize_size={dataset.resize_size}: the crop of dataset.image_size="
            f"{'null' if side is None else side} doesn't fit into it. "
            f"Fix: {'set dataset.image_size' if side is None else f'{side} or more'}"
        )
    return problems


def _file_crop_problems(dataset: DatasetConfig, views: int) -> list[str]:
    key, problems = "dataset.resized_crop.source=file", []
    if not dataset.in_files:
        problems.append(
            f"{key}: dataset={dataset.name} has no image files to crop from. Fix: dataset.resized_crop.source=square"
        )
    if dataset.location != "auto":
        problems.append(
            f"dataset.location={dataset.location}: not allowed with {key}, which decodes files while training. "
            "Fix: dataset.location=auto"
        )
    if dataset.resized_crop.scale is None and views == 1:
        problems.append(f"{key}: does nothing without a resized crop. Fix: dataset.resized_crop.scale=[0.08,1]")
    return problems


def without_augmentation(dataset: DatasetConfig) -> DatasetConfig:
    """Return the options for training on images as evaluations take them."""
    return replace(
        dataset,
        crop_padding=0,
        flip=False,
        rotation=0.0,
        resized_crop=ResizedCropConfig(),
        color_jitter=ColorJitterConfig(),
        rand_augment=RandAugmentConfig(),
        erasing=ErasingConfig(),
    )
