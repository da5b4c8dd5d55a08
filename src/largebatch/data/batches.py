"""Batches for training and evaluation: indices, pixels, augmentation, normalisation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from largebatch.config import DatasetConfig
from largebatch.data import augment
from largebatch.data.sampling import evaluation_share, global_batches, steps_per_epoch
from largebatch.data.split import Split
from largebatch.data.stream import stream
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
) -> Iterator[Batch]:
    """Endless micro-batches of this rank from optimizer step ``start_step`` (from 0) on, augmented and normalised.

    Each is (images float32 [micro_batch, C, S, S], labels int64 [micro_batch]) on ``device``; a step gives
    ``batch_size / processes / micro_batch`` of them. The global batch of a step is a run of the epoch's order; rank r
    takes its r-th part, and the micro-batches are that part's pieces. Random numbers are drawn for the whole global
    batch, so an image gets the same ones with any number of processes, any accumulation, and after a resume.

    Raises:
        UserError: when ``batch_size`` is larger than ``split``; while iterating, when an image file can't be read.
    """
    steps_per_epoch(len(split), batch_size)  # raises now, not at the first batch
    if batch_size % (processes * micro_batch):
        raise ValueError(f"{batch_size=} isn't a multiple of {processes=} times {micro_batch=}")
    return _train_batches(
        split, config, mean, std, batch_size, rank, processes, micro_batch, seed, start_step, torch.device(device)
    )


def _train_batches(
    split: Split,
    config: DatasetConfig,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int,
    rank: int,
    processes: int,
    micro_batch: int,
    seed: int,
    start_step: int,
    device: torch.device,
) -> Iterator[Batch]:
    share = batch_size // processes
    parts = [slice(i, i + micro_batch) for i in range(rank * share, (rank + 1) * share, micro_batch)]

    def steps() -> Iterator[tuple[int, Tensor]]:
        return global_batches(len(split), batch_size, seed, start_step)

    # Decoding runs ahead of the loop below, so it walks through the same steps on its own.
    wanted = (indices[part] for _, indices in steps() for part in parts)
    decoded = stream(split.images, wanted, batch=micro_batch, workers=config.workers)
    augmented = config.crop_padding > 0 or config.flip or config.rotation > 0
    for step, indices in steps():
        generator = torch.Generator().manual_seed(derive_seed(seed, "augment", step))
        draws = augment.draw(
            generator, batch_size, padding=config.crop_padding, flip=config.flip, rotation=config.rotation
        )
        for part in parts:
            pixels = next(decoded).to(device, non_blocking=True)
            if augmented:
                pixels = augment.apply(pixels, draws[part])
            labels = split.labels[indices[part]].to(device, non_blocking=True)
            yield augment.normalise(pixels, mean, std), labels


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
) -> Iterator[Batch]:
    """This rank's share of the whole split, once, as (images float32 [<= batch, C, S, S], labels int64 [<= batch]).

    The shares are disjoint and complete; where sizes don't divide, ranks get different numbers of images, maybe none.
    """
    share = evaluation_share(len(split), rank, processes)
    parts = torch.split(share, batch) if len(share) else ()
    for part, pixels in zip(parts, stream(split.images, parts, batch=batch, workers=workers), strict=True):
        on_device = pixels.to(device, non_blocking=True)
        yield augment.normalise(on_device, mean, std), split.labels[part].to(device, non_blocking=True)
