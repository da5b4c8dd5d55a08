"""Batches for training and evaluation: indices, pixels, augmentation, normalisation."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from largebatch.config.datasets import DatasetConfig
from largebatch.data import views
from largebatch.data.augment import augmented
from largebatch.data.draws import Draws, draw
from largebatch.data.images import MemoryImages
from largebatch.data.sampling import evaluation_share, global_batches, steps_per_epoch
from largebatch.data.split import Split
from largebatch.data.stream import stream
from largebatch.data.transfer import one_ahead, to_device
from largebatch.data.view_draws import configured_views
from largebatch.seeding import derive_seed

Batch = tuple[Tensor, Tensor]


def train_batches(
    split: Split,
    config: DatasetConfig,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    batch_size: int,
    rank: int,
    processes: int,
    micro_batch: int,
    seed: int,
    start_step: int,
    device: torch.device | str,
    channels_last: bool = False,
    two_views: bool = False,
    passes: int = 1,
) -> Generator[Batch]:
    """Yield endless micro-batches of this rank from optimizer step ``start_step`` on, augmented and normalised.

    Each is (images float32 [micro_batch, C, S, S], labels int64 [micro_batch]) on ``device``; a step has
    ``batch_size / processes / micro_batch`` of them. The global batch of a step is a slice of the epoch's order; rank r
    takes its r-th part, and the micro-batches are pieces of that part. Random numbers are drawn for the whole global
    batch, so an image gets the same draws with any number of processes, any accumulation, and after a resume.

    Args:
        start_step: number of the first step, from 0.
        channels_last: the memory format of the images.
        two_views: images are [2 * micro_batch, C, S, S], the first and then the second views of Barlow Twins, instead
            of the crops, flips and rotations of ``config``.
        passes: number of times that the micro-batches of a step are repeated.

    Raises:
        UserError: if ``batch_size`` is larger than ``split``; while iterating, if an image file can't be read.
    """
    steps_per_epoch(len(split), batch_size)  # raises now, not at the first batch
    if batch_size % (processes * micro_batch):
        raise ValueError(f"{batch_size=} isn't a multiple of {processes=} times {micro_batch=}")
    where = torch.device(device)
    statistics = to_device(torch.tensor(mean), where), to_device(torch.tensor(std), where)
    share = batch_size // processes
    parts = [slice(first, first + micro_batch) for first in range(0, share, micro_batch)]

    def steps() -> Iterator[tuple[int, Tensor]]:
        """Yield each step and this rank's indices."""
        for step, indices in global_batches(len(split), batch_size, seed, start_step):
            yield step, indices[rank * share : (rank + 1) * share]

    def augment(pixels: Tensor, indices: Tensor | None, draws: list[Any]) -> Tensor:
        if not draws:
            return augmented(pixels, indices, None, *statistics, channels_last=channels_last)
        function = views.view if two_views else augmented
        images = [function(pixels, indices, one, *statistics, channels_last=channels_last) for one in draws]
        return torch.cat(images) if two_views else images[0]

    def batches() -> Generator[Batch]:
        # Decoding runs ahead of the loop below, so it has its own iterator over the same steps.
        wanted = (indices[part] for _, indices in steps() for part in parts * passes)
        pixels = _pixels(split, wanted, micro_batch, config.workers, where)
        for step, indices in steps():
            generator = torch.Generator().manual_seed(derive_seed(seed, "augment", step))
            drawn = _draw(generator, split, batch_size, config, two_views)
            draws = [one[rank * share : (rank + 1) * share].to(where) for one in drawn]
            labels = _labels(split, indices, where)
            for part in parts * passes:
                yield augment(*next(pixels), [one[part] for one in draws]), labels[part]

    return batches()


def eval_batches(
    split: Split,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    rank: int,
    processes: int,
    batch: int,
    device: torch.device | str,
    workers: int,
    channels_last: bool = False,
    chosen: Tensor | None = None,
) -> Iterator[Batch]:
    """Yield this rank's share of the split, once, as (images float32 [<= batch, C, S, S], labels int64 [<= batch]).

    The shares are disjoint and complete. If sizes don't divide, ranks get different numbers of images, maybe none.

    Args:
        chosen: indices on the CPU of the images to evaluate; None: all.
    """
    where = torch.device(device)
    statistics = to_device(torch.tensor(mean), where), to_device(torch.tensor(std), where)
    share = evaluation_share(len(split) if chosen is None else len(chosen), rank, processes)
    if chosen is not None:
        share = chosen[share]
    parts = torch.split(share, batch) if len(share) else ()
    found = _pixels(split, iter(parts), batch, workers, where)
    for part, (pixels, indices) in zip(parts, found, strict=True):
        images = augmented(pixels, indices, None, *statistics, channels_last=channels_last)
        yield images, _labels(split, part, where)


def _pixels(
    split: Split, wanted: Iterator[Tensor], batch: int, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield uint8 images on ``device`` for each of ``wanted`` (int64 [n]): all images and the indices, or the chosen.

    The augmentation itself picks images that are on the device. Others are copied there one batch ahead.
    """
    images = split.images
    if isinstance(images, MemoryImages) and images.pixels.device == device:
        return ((images.pixels, to_device(indices, device)) for indices in wanted)
    fetched = stream(images, wanted, batch=batch, workers=workers)
    return ((pixels, None) for pixels in one_ahead(fetched, device))


def _labels(split: Split, indices: Tensor, device: torch.device) -> Tensor:
    if split.labels.device == device:
        return split.labels[to_device(indices, device)]
    return to_device(split.labels[indices], device)


def _draw(
    generator: torch.Generator, split: Split, n: int, config: DatasetConfig, two_views: bool
) -> list[Draws] | list[views.ViewDraws]:
    """Return the draws for a global batch, one a view; an empty list without augmentation."""
    side = split.images.image_size
    if two_views:
        return [views.draw(generator, n, side, view) for view in configured_views(config)]
    padding, flip, rotation = config.crop_padding, config.flip, config.rotation
    if padding == 0 and not flip and rotation == 0:
        return []
    return [draw(generator, n, padding=padding, flip=flip, rotation=rotation, side=side)]
