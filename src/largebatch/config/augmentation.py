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


def augmentation_problems(dataset: DatasetConfig) -> list[str]:
    """Return one line for each conflict between options of the augmentation."""
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
    if dataset.resize_size is not None and (side is None or dataset.resize_size < side):
        problems.append(
            f"dataset.resize_size={dataset.resize_size}: the crop of dataset.image_size="
            f"{'null' if side is None else side} doesn't fit into it. "
            f"Fix: {'set dataset.image_size' if side is None else f'{side} or more'}"
        )
    return problems


def without_augmentation(dataset: DatasetConfig) -> DatasetConfig:
    """Return the options for training on images as evaluations take them."""
    return replace(dataset, crop_padding=0, flip=False, rotation=0.0, resized_crop=ResizedCropConfig())
