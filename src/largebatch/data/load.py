"""Loading of the configured data set: splits on the device, in memory or in files, classes and statistics."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from largebatch.config.datasets import DATASETS, DatasetConfig
from largebatch.data.cache import Say
from largebatch.data.decoding import check_all, decode_all, without
from largebatch.data.images import FileImages, Images, MemoryImages, decoded_bytes, resize
from largebatch.data.location import Place, choose_location, on_device
from largebatch.data.split import Split, hold_out
from largebatch.data.stream import stream
from largebatch.errors import UserError, choices
from largebatch.machine.memory import free_memory, host_memory
from largebatch.seeding import derive_seed

Loaded = tuple[Split, Split, tuple[str, ...]]  # training set, test set, class names
_MEASURED_IMAGES = 2000
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Data:
    """A data set: its splits, class names by label, and per-channel statistics of pixels in 0..1.

    ``place`` is the place of the pixels: on the ``device`` (with the labels), in the ``host``'s memory, or in ``files``
    that are decoded when they are needed. ``skipped`` is the number of images that couldn't be read.
    """

    train: Split
    val: Split | None
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    place: Place = "host"
    skipped: int = 0

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def channels(self) -> int:
        return self.train.images.channels

    @property
    def image_size(self) -> int:
        return self.train.images.image_size

    @property
    def image(self) -> tuple[int, int, int]:
        """The shape of an image: channels, height, width."""
        return self.channels, self.image_size, self.image_size


def load_data(
    config: DatasetConfig, seed: int, device: torch.device = _CPU, say: Say = lambda line: None, processes_here: int = 1
) -> Data:
    """Load the data set ``config.name``; download it if that is allowed and needed.

    If ``config.location`` and the free memory of ``device`` and host allow it, all images are decoded now (and kept in
    ``config.root/.largebatch`` for the next start) and stay in memory; otherwise each is decoded when it is needed.
    ``config.val_fraction`` of the training set is held out, stratified, by ``seed``; the test set doesn't change. Sizes
    and numbers of classes come from the files; the configuration's are for the launcher only.

    Args:
        device: the device of the run.
        say: called with a line about slow work and about deviations from the configuration.
        processes_here: number of this run's processes on this machine; they share the host's memory and its cores.

    Raises:
        UserError: if files are missing, damaged or contradict the configuration; it names the file or key.
    """
    train, test, classes = _load(config, say)
    listed, in_files = (train, test), isinstance(train.images, FileImages)
    size = decoded_bytes(train.images) + decoded_bytes(test.images)
    device_free = free_memory(device) if device.type != "cpu" else None
    host_free = host_memory() // processes_here
    place, why = choose_location(config.location, size, device_free, host_free, in_memory=not in_files)
    if place == "files" or (config.location == "device" and device_free is not None and place != "device"):
        say(f"dataset.location={config.location}: {why}")

    unreadable: tuple[str, ...] = ()
    threads = torch.get_num_threads() * processes_here  # one process decodes while the others wait
    if in_files and place != "files":
        decoded = decode_all(train, test, classes, config, threads, say)
        train, test, unreadable = decoded.train, decoded.test, decoded.unreadable
    elif in_files and config.verify:
        train, test, unreadable = check_all(train, test, config, threads, say)

    kept, held = _validation_part(train.labels, config.val_fraction, seed)
    mean, std = config.mean, config.std
    if mean is None or std is None:
        sample = train.images.select(kept[_evenly_spaced(len(kept))])
        measured_mean, measured_std = measure_statistics(sample, config.workers)
        mean, std = mean or measured_mean, std or measured_std
    try:
        splits = _placed(train, test, kept, held, device if place == "device" else None)
    except torch.OutOfMemoryError:
        place, why = choose_location("host", size, None, host_free, in_memory=not in_files)
        say(f"dataset.location={config.location}: the device ran out of memory for the pixels; {why}")
        if place == "files":
            train, test = (without(split, unreadable, config.root) for split in listed)
        splits = _placed(train, test, kept, held, None)
    return Data(*splits, classes, tuple(mean), tuple(std), place, len(unreadable))


def _load(config: DatasetConfig, say: Say) -> Loaded:
    if config.name not in DATASETS:
        raise UserError(f"dataset.name={config.name}: {choices(config.name, DATASETS)}")
    module, _, function = DATASETS[config.name].loader.partition(":")
    load: Callable[[DatasetConfig, Say], Loaded] = getattr(importlib.import_module(module), function)
    try:
        train, test, classes = load(config, say)
    except OSError as error:  # for example a folder without read permission
        raise UserError(f"dataset={config.name}: {error}; check dataset.root={config.root}") from error
    if train.images.channels != config.channels:
        raise UserError(
            f"dataset.channels={config.channels}: the images of {config.name} have {train.images.channels}; "
            "only imagefolder, imagenet and synthetic can have another number"
        )
    size = config.image_size
    return (train, test, classes) if size is None else (_at_size(train, size), _at_size(test, size), classes)


def _placed(
    train: Split, test: Split, kept: Tensor, held: Tensor | None, device: torch.device | None
) -> tuple[Split, Split | None, Split]:
    """Return training, validation and test set on ``device``; None: on the host.

    A selection is a copy. On the host, the memory of the original is free after this call: the system can drop a mapped
    file of pixels, and nothing else refers to other pixels. On a device only the selections are allocated.
    """

    def place(split: Split, indices: Tensor | None) -> Split:
        if device is not None:
            return on_device(split, indices, device)
        return split if indices is None else split.select(indices)

    if held is None:
        return place(train, None), None, place(test, None)
    return place(train, kept), place(train, held), place(test, None)


def measure_statistics(images: Images, workers: int = 0) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel, for pixels in 0..1, over up to 2000 evenly spaced images.

    A constant channel gets the deviation 1/255, so that normalisation can divide by it.
    """
    chosen = _evenly_spaced(len(images))
    total = torch.zeros(images.channels, dtype=torch.float64)
    squares = torch.zeros(images.channels, dtype=torch.float64)
    for pixels in stream(images, torch.split(chosen, 256), batch=256, workers=workers):
        scaled = pixels.double().div_(255).transpose(0, 1).flatten(1)
        total += scaled.sum(1)
        squares += scaled.square().sum(1)
    pixels_a_channel = len(chosen) * images.image_size**2
    mean = total / pixels_a_channel
    std = (squares / pixels_a_channel - mean.square()).clamp(min=0).sqrt().clamp(min=1 / 255)
    return mean.tolist(), std.tolist()


def _evenly_spaced(n: int) -> Tensor:
    """Return the indices of the images among ``n`` to measure, at most 2000."""
    count = min(n, _MEASURED_IMAGES)
    return torch.arange(count) * n // count


def _at_size(split: Split, image_size: int) -> Split:
    images = split.images
    if image_size == images.image_size or not isinstance(images, MemoryImages):
        return split
    return Split(resize(images, image_size), split.labels)


def _validation_part(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor | None]:
    """Return the indices of the training images that are kept, and of the images that are held out."""
    if fraction == 0:
        return torch.arange(len(labels)), None
    count = len(labels) - round(len(labels) * (1 - fraction))  # as the launcher counts
    try:
        return hold_out(labels, count, derive_seed(seed, "validation"))
    except UserError as error:
        raise UserError(f"dataset.val_fraction={fraction}: {error}") from None
