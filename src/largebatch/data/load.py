"""Loading of the configured data set: splits on the device, in memory or in files, classes and statistics."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from largebatch.config.datasets import DATASETS, CustomDataset, DatasetConfig
from largebatch.data.cache import Say
from largebatch.data.content import Content, content_of
from largebatch.data.decoding import read_files
from largebatch.data.images import Images, MemoryImages, Split, decoded_bytes
from largebatch.data.sampling import hold_out_parts
from largebatch.data.stream import DecodingTimes, stream
from largebatch.errors import UserError
from largebatch.machine.memory import free_memory, host_memory
from largebatch.seeding import derive_seed

Loaded = tuple[Split, Split, tuple[str, ...]]  # training set, test set, class names
Place = Literal["device", "host", "files"]  # of a data set's pixels
_MOST = 8 << 30  # bytes of memory that data takes by default, at most
_PIECE_BYTES = 64 << 20
_MEASURED_IMAGES = 2000
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Data:
    """A data set: its splits, class names by label, and per-channel statistics of pixels in 0..1.

    ``image_size`` is the side of the network's images in pixels; the splits have ``dataset.resize_size``. ``place`` is
    the place of the pixels: on the ``device`` (with the labels), in the ``host``'s memory, or in ``files`` that are
    decoded when they are needed. ``content`` describes the whole data set. ``times`` are of decoding for training.
    """

    train: Split
    val: Split | None
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    content: Content
    image_size: int
    place: Place = "host"
    times: DecodingTimes = field(default_factory=DecodingTimes)

    @property
    def skipped(self) -> int:
        """Number of images that couldn't be read."""
        return self.content.skipped

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def channels(self) -> int:
        return self.train.images.channels

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
    and numbers of classes come from the files; the configuration's are for the launcher, and may not contradict them.

    Args:
        device: the device of the run.
        say: called with a line about slow work and about deviations from the configuration.
        processes_here: number of this run's processes on this machine; they share the host's memory and its cores.

    Raises:
        UserError: if files are missing, damaged or contradict the configuration; it names the file or key.
    """
    load: Callable[[DatasetConfig, Say], Loaded] = pkgutil.resolve_name(_kind(config).loader)
    try:
        train, test, classes = load(replace(config, image_size=config.resize_size or config.image_size), say)
    except OSError as error:  # for example a folder without read permission
        raise UserError(f"dataset={config.name}: {error}; check dataset.root={config.root}") from error
    config.check_sizes(len(train), len(test), len(classes))
    image_size, in_files = config.side_of_crop(train.images.image_size), not isinstance(train.images, MemoryImages)
    size = decoded_bytes(train.images) + decoded_bytes(test.images)
    device_free = free_memory(device) if device.type != "cpu" else None
    place, why = choose_location(
        config.location, size, device_free, host_memory() // processes_here, in_memory=not in_files
    )
    if config.resized_crop.source == "file":
        place, why = "files", "dataset.resized_crop.source=file, so images are decoded while training"
    if place == "files" or (config.location == "device" and device_free is not None and place != "device"):
        say(f"dataset.location={config.location}: {why}")

    whole = train, test
    unreadable: tuple[str, ...] = ()
    threads = torch.get_num_threads() * processes_here  # one process decodes while the others wait
    if in_files and (place != "files" or config.verify):
        found = read_files(train, test, classes, config, threads, say, decode=place != "files")
        train, test, unreadable = found.train, found.test, found.unreadable

    content = content_of(*whole, classes, config.root, unreadable)

    kept, held = _validation_part(train.labels, config, seed)
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
        return Data(train, val, test, classes, tuple(mean), tuple(std), content, image_size, place)
    return load_data(replace(config, location="host"), seed, device, say, processes_here)


def _kind(config: DatasetConfig) -> type[DatasetConfig]:
    return CustomDataset if isinstance(config, CustomDataset) else DATASETS[config.name]


def choose_location(
    location: str, decoded_bytes: int, device_free: int | None, host_free: int, in_memory: bool = False
) -> tuple[Place, str]:
    """Return the place of ``decoded_bytes`` of pixels by ``dataset.location``, and the reason if it isn't the device.

    ``device_free`` and ``host_free`` are free bytes; ``device_free`` is None if the device's memory is the host's.
    ``auto`` takes the device, and ``host`` the host's memory, for at most a quarter of the free memory and at most 8
    GiB; ``device`` takes up to 80 % of the device's free memory. Pixels that don't fit on the device go to the host's
    memory, and pixels that don't fit there stay in their files. Pixels that are ``in_memory`` already stay there.
    """
    why = f"{in_words(decoded_bytes)} of pixels are "
    if device_free is not None and location != "host":
        room, rule = (device_free * 4 // 5, "80 %") if location == "device" else _room(device_free)
        if decoded_bytes <= room:
            return "device", ""
        why += f"more than {rule} of the device's {in_words(device_free)} of free memory, and "
    room, rule = _room(host_free)
    if in_memory or decoded_bytes <= room:
        return "host", f"{why}stay in the host's memory"
    why += f"more than {rule} of the host's {in_words(host_free)} of free memory"
    return "files", f"{why}, so images are decoded while training"


def _room(free: int) -> tuple[int, str]:
    """Return the default limit in bytes, and in words."""
    if free // 4 > _MOST:
        return _MOST, f"{in_words(_MOST)}, the default limit,"
    return free // 4, "a quarter"


def in_words(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def on_device(split: Split, indices: Tensor | None, device: torch.device) -> Split:
    """Copy the images and labels (all, or at ``indices``) of a split in memory to ``device``.

    The copy goes piece by piece, so that it needs no other memory on the device and no second copy on the host.
    """
    assert isinstance(split.images, MemoryImages)
    pixels, labels = split.images.pixels, split.labels
    if indices is not None:
        labels = labels[indices]
    moved = torch.empty(len(labels), *pixels.shape[1:], dtype=torch.uint8, device=device)
    size = max(_PIECE_BYTES // pixels[0].numel(), 1)
    for first in range(0, len(labels), size):
        piece = slice(first, first + size)
        moved[piece] = pixels[piece] if indices is None else pixels[indices[piece]]
    return Split(MemoryImages(moved), labels.to(device))


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


def _validation_part(labels: Tensor, config: DatasetConfig, seed: int) -> tuple[Tensor, Tensor | None]:
    """Return the indices of the training images that are kept, and of the images that are held out.

    Images of one source are on the same side.
    """
    if config.val_fraction == 0:
        return torch.arange(len(labels)), None
    copies = _kind(config).copies
    sources = labels[::copies]
    parts = config.validation_sizes(torch.bincount(sources).tolist())  # as the launcher counts
    kept, held = hold_out_parts(sources, parts, derive_seed(seed, "validation"))

    def images(sources: Tensor) -> Tensor:
        return (sources[:, None] * copies + torch.arange(copies)).flatten()

    return images(kept), images(held)
