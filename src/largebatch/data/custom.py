"""Images of a user's own function or class (``dataset.library=custom``), in memory.

The target returns training data, test data and class names. The data are a tuple of images and labels, or a map-style
dataset of pairs (image, label), such as a ``torch.utils.data.Dataset``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from largebatch.config.datasets import CustomDataset, DatasetConfig
from largebatch.data.cache import Say
from largebatch.data.images import MemoryImages, Split, in_mode, resize, resized
from largebatch.errors import UserError
from largebatch.machine.memory import host_memory

_GREY = ("1", "L", "LA", "I", "F")  # PIL's modes


def load_custom(config: DatasetConfig, say: Say) -> tuple[Split, Split, tuple[str, ...]]:
    """Call the target. Return both splits with uint8 pixels of ``image_size``, and the class names.

    Images are uint8, or floats from 0 to 1, of shape [N, C, S, S] or [N, S, S], as a tensor or an array. A dataset has
    such images without N, or PIL images; PIL images are resized and cropped as files are.

    Raises:
        UserError: the target returns something else; as ``Custom.call``.
    """
    config = cast(CustomDataset, config)
    found = config.call(**({"root": config.root} if config.root else {}))
    if not isinstance(found, tuple | list) or len(found) != 3:
        raise _error(config, f"returns {_described(found)}", "training data, test data and class names")
    classes = found[2]
    if not isinstance(classes, tuple | list) or len(classes) < 2 or not all(isinstance(name, str) for name in classes):
        raise _error(config, f"returns {classes!r} as class names", "a list of two or more texts")
    train, test = (
        _split(config, split, data, len(classes))
        for split, data in zip(("training data", "test data"), found[:2], strict=True)
    )
    if train.images.channels != test.images.channels or train.images.image_size != test.images.image_size:
        shapes = [f"{one.images.channels}x{one.images.image_size}x{one.images.image_size}" for one in (train, test)]
        raise _error(config, f"has training images of {shapes[0]} and test images of {shapes[1]}", "one shape")
    return train, test, tuple(classes)


def _split(config: CustomDataset, which: str, data: Any, classes: int) -> Split:
    if isinstance(data, tuple) and len(data) == 2:
        images, labels = (_tensor(config, which, part) for part in data)
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        images, labels = _read(config, which, data)
    else:
        allowed = "a tuple of images and labels, or a dataset of pairs with a length"
        raise _error(config, f"returns {_described(data)} as {which}", allowed)
    pixels = _pixels(config, which, images)
    integers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.shape != (len(pixels),) or not integers:
        problem = (
            f"has labels of shape {list(labels.shape)} and type {labels.dtype} for {len(pixels)} images in {which}"
        )
        raise _error(config, problem, "an integer for each image")
    if labels.min() < 0 or labels.max() >= classes:
        problem = f"has labels from {labels.min()} to {labels.max()} in {which}"
        raise _error(config, problem, f"0 to {classes - 1}, the positions in its {classes} class names")
    return Split(MemoryImages(resize(pixels, config.image_size or pixels.shape[2])), labels.long())


def _pixels(config: CustomDataset, which: str, images: Tensor) -> Tensor:
    """Return images as uint8 [N, C, S, S]."""
    if images.ndim == 3:
        images = images[:, None]
    shape = list(images.shape)
    if images.ndim != 4 or 0 in shape or shape[1] not in (1, 3) or shape[2] != shape[3]:
        fix = ", such as images.transpose(0, 3, 1, 2)" if len(shape) == 4 and shape[3] in (1, 3) else ""
        allowed = f"square images of shape [N, C, S, S] with C of 1 or 3, or [N, S, S]{fix}"
        raise _error(config, f"has images of shape {shape} in {which}", allowed)
    if config.channels not in (None, shape[1]):
        raise UserError(f"dataset.channels={config.channels}: {which} has {shape[1]}. Fix: leave it out")
    if images.dtype == torch.uint8:
        return images.contiguous()
    if not images.is_floating_point() or not (images.min() >= 0 and images.max() <= 1):
        problem = f"has images of type {images.dtype} from {images.min():g} to {images.max():g} in {which}"
        raise _error(config, problem, "uint8, or floats from 0 to 1")
    return (images * 255).round_().to(torch.uint8).contiguous()


def _read(config: CustomDataset, which: str, data: Any) -> tuple[Tensor, Tensor]:
    """Read all items of a dataset into memory."""
    images, labels = torch.empty(0), torch.zeros(len(data), dtype=torch.long)
    for number, (image, label) in enumerate(_pairs(config, which, data)):
        if number == 0:
            size, free = len(data) * image.numel() * image.element_size(), host_memory()
            if size > free:
                problem = f"has {which} of {size / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB of memory are free"
                raise _error(config, problem, "images that fit into memory; dataset=imagefolder reads files")
            images = torch.empty(len(data), *image.shape, dtype=image.dtype)
        if image.shape != images.shape[1:] or image.dtype != images.dtype:
            problem = (
                f"has image {number} of shape {list(image.shape)} and type {image.dtype} in {which}, after images of "
                f"shape {list(images.shape[1:])} and type {images.dtype}"
            )
            raise _error(config, problem, "one shape; dataset.image_size=PIXELS resizes PIL images")
        images[number], labels[number] = image, label
    return images, labels


def _pairs(config: CustomDataset, which: str, data: Any) -> Iterator[tuple[Tensor, int]]:
    for number in range(len(data)):
        with config.noted():
            item = data[number]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise _error(config, f"has {_described(item)} as item {number} of {which}", "a pair of image and label")
        image, label = item
        if isinstance(image, Image):
            grey = config.channels == 1 or (config.channels is None and image.mode in _GREY)
            image = in_mode(image, "L" if grey else "RGB")
            array = np.asarray(resized(image, config.image_size) if config.image_size else image)
            image = array if grey else array.transpose(2, 0, 1)
        try:
            yield _tensor(config, which, image), int(label)
        except (TypeError, ValueError):
            problem = f"has {_described(label)} as the label of item {number} of {which}"
            raise _error(config, problem, "an integer") from None


def _tensor(config: CustomDataset, which: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(np.array(value) if isinstance(value, np.ndarray | list) else value).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise _error(config, f"has {_described(value)} in {which}", "tensors and arrays of numbers") from None


def _described(value: Any) -> str:
    size = f" of {len(value)}" if isinstance(value, tuple | list) else ""
    return f"a {type(value).__name__}{size}"


def _error(config: CustomDataset, problem: str, allowed: str) -> UserError:
    return UserError(f"{config.key}: {problem}. Allowed: {allowed}")
