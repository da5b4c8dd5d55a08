"""Loading of the configured data set: splits on the device, in memory or in files, classes and statistics."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from largebatch.config.datasets import DATASETS, DatasetConfig
from largebatch.data.cache import Say
from largebatch.data.decoding import read_files
from largebatch.data.images import FileImages, Images, Split, decoded_bytes
from largebatch.data.location import Place, choose_location, on_device
from largebatch.data.sampling import hold_out
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
    in_files = isinstance(train.images, FileImages)
    size = decoded_bytes(train.images) + decoded_bytes(test.images)
    device_free = free_memory(device) if device.type != "cpu" else None
    place, why = choose_location(
        config.location, size, device_free, host_memory() // processes_here, in_memory=not in_files
    )
    if place == "files" or (config.location == "device" and device_free is not None and place != "device"):
        say(f"dataset.location={config.location}: {why}")

    unreadable: tuple[str, ...] = ()
    threads = torch.get_num_threads() * processes_here  # one process decodes while the others wait
    if in_files and (place != "files" or config.verify):
        found = read_files(train, test, classes, config, threads, say, decode=place != "files")
        train, test, unreadable = found.train, found.test, found.unreadable

    kept, held = _validation_part(train.labels, config.val_fraction, seed)
    mean, std = config.mean, config.std
    if mean is None or std is None:
        measured_mean, measured_std = measure_statistics(train.images, kept, config.workers)
        mean, std = mean or measured_mean, std or measured_std

    def placed(split: Split, indices: Tensor | None = None) -> Split:
        """Return the images at ``indices`` on the device or host. Without ``indices``, the host keeps the original.

        A selection is a copy. The memory of the original is free after the call: the system can drop a mapped file of
        pixels, and nothing else refers to other pixels. On a device only the selections are allocated.
        """
        if place == "device":
            return on_device(split, indices, device)
        return split if indices is None else split.select(indices)

    try:
        val = None if held is None else placed(train, held)
        train, test = placed(train, None if held is None else kept), placed(test)
    except torch.OutOfMemoryError:
        say(f"dataset.location={config.location}: the pixels don't fit on the device, so they stay on the host")
    else:
        return Data(train, val, test, classes, tuple(mean), tuple(std), place, len(unreadable))
    return load_data(replace(config, location="host"), seed, device, say, processes_here)


def _load(config: DatasetConfig, say: Say) -> Loaded:
    if config.name not in DATASETS:
        raise UserError(f"dataset.name={config.name}: {choices(config.name, DATASETS)}")
    load: Callable[[DatasetConfig, Say], Loaded] = pkgutil.resolve_name(DATASETS[config.name].loader)
    try:
        return load(config, say)
    except OSError as error:  # for example a folder without read permission
        raise UserError(f"dataset={config.name}: {error}; check dataset.root={config.root}") from error


def measure_statistics(images: Images, indices: Tensor, workers: int = 0) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel, for pixels in 0..1, of the images at ``indices``.

    At most 2000 evenly spaced images of them are measured. A constant channel gets the deviation 1/255, so that
    normalisation can divide by it.
    """
    count = min(len(indices), _MEASURED_IMAGES)
    chosen = indices[torch.arange(count) * len(indices) // count]
    total = torch.zeros(images.channels, dtype=torch.float64)
    squares = torch.zeros(images.channels, dtype=torch.float64)
    for pixels in stream(images, torch.split(chosen, 256), batch=256, workers=workers):
        scaled = pixels.double().div_(255).transpose(0, 1).flatten(1)
        total += scaled.sum(1)
        squares += scaled.square().sum(1)
    pixels_a_channel = count * images.image_size**2
    mean = total / pixels_a_channel
    std = (squares / pixels_a_channel - mean.square()).clamp(min=0).sqrt().clamp(min=1 / 255)
    return mean.tolist(), std.tolist()


def _validation_part(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor | None]:
    """Return the indices of the training images that are kept, and of the images that are held out."""
    if fraction == 0:
        return torch.arange(len(labels)), None
    count = len(labels) - round(len(labels) * (1 - fraction))  # as the launcher counts
    try:
        return hold_out(labels, count, derive_seed(seed, "validation"))
    except UserError as error:
        raise UserError(f"dataset.val_fraction={fraction}: {error}") from None
