"""Batches for training and evaluation: indices, pixels, augmentation, normalisation."""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from largebatch.config.batch import BatchPlan
from largebatch.config.datasets import DatasetConfig
from largebatch.config.epochs import Epochs
from largebatch.config.modes import Clf
from largebatch.data.chain import Chain, chained, draw_chain
from largebatch.data.draws import ViewDraws, draw_view
from largebatch.data.file_crops import FileCrop, file_crop
from largebatch.data.images import MemoryImages, Split, centre
from largebatch.data.mixing import draw_mixing, mixed, soft
from largebatch.data.sampling import evaluation_share, global_batches
from largebatch.data.stream import DecodingTimes, one_ahead, stream, to_device
from largebatch.seeding import derive_seed

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class BatchLoader:
    """Batches of one rank on one device, augmented and normalised.

    Attributes:
        config: augmentation, and the number of decoding processes.
        mean, std: per channel, of pixels in 0..1.
        channels_last: memory format of the images.
        times: of decoding images for training.
    """

    config: DatasetConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    rank: int
    processes: int
    channels_last: bool = False
    times: DecodingTimes = field(default_factory=DecodingTimes)

    def train(
        self,
        split: Split,
        epochs: Epochs,
        batch: BatchPlan,
        seed: int,
        start_step: int,
        views: int = 1,
        passes: int = 1,
        mixing: Clf | None = None,
        classes: int = 0,
    ) -> Generator[Batch]:
        """Yield endless micro-batches from optimizer step ``start_step`` (from 0) on.

        Each is (images float32 [views * n, C, S, S], labels int64 [n]), with n at most ``batch.micro_batch``. With
        ``mixing``, labels are float32 [n, classes], the parts of the classes. The global batch of a step follows in the
        epoch's order. A rank's micro-batches are its ``pieces`` of the batch. Random numbers are drawn for the whole
        global batch, so an image gets the same draws with any number of processes, any accumulation, and after a
        resume.

        Args:
            split: training images.
            epochs: number of images in each step.
            batch: division of the global batch.
            seed: of order and augmentation.
            views: 1: the configured augmentation; 2: the first and then the second views of Barlow Twins.
            passes: number of times that the micro-batches of a step are repeated, unless there is only one.
            mixing: options of mixup and CutMix, of one view; then ``batch.together`` must be even.
            classes: number of classes, for ``mixing``.

        Raises:
            UserError: while iterating, if an image file can't be read.
        """

        def pieces_of(indices: Tensor) -> tuple[slice, ...]:
            pieces = batch.pieces(self.rank, len(indices))
            return pieces * passes if len(pieces) > 1 else pieces

        side = self.config.side_of_crop(split.images.image_size)
        crop = file_crop(self.config, side, views)
        # Decoding runs ahead of the loop below, so it has its own iterator over the same steps.
        ahead = global_batches(epochs, seed, start_step)
        rows = (indices if crop is None else crop.rows(indices, seed, step) for step, indices in ahead)
        wanted = (of_step[piece] for of_step in rows for piece in pieces_of(of_step))
        pixels = self._pixels(split, wanted, batch.micro_batch, crop, self.times)
        for step, indices in global_batches(epochs, seed, start_step):
            generator = torch.Generator().manual_seed(derive_seed(seed, "augment", step))
            drawn = self._draw(generator, side if crop else split.images.image_size, len(indices), views)
            pieces = pieces_of(indices)
            share = slice(pieces[0].start, pieces[-1].stop) if pieces else slice(0, 0)
            draws = [chain[share].to(self.device) for chain in drawn]
            labels = self._labels(split, indices[share])
            mix = None
            if mixing is not None:
                labels = soft(labels, classes)
                mix = draw_mixing(derive_seed(seed, "mix", step), len(indices), side, mixing)
                mix = None if mix is None else mix[share].to(self.device)
            for part in (slice(piece.start - share.start, piece.stop - share.start) for piece in pieces):
                images, chosen = next(pixels)
                each = images.unbind(1) if crop else [images] * views
                seen = [self._augmented(one, chosen, chain[part]) for one, chain in zip(each, draws, strict=True)]
                batch_of_part = torch.cat(seen) if views > 1 else seen[0], labels[part]
                yield batch_of_part if mix is None else mixed(*batch_of_part, mix[part])

    def evaluate(self, split: Split, size: int, chosen: Tensor | None = None) -> Iterator[Batch]:
        """Yield this rank's share of the split, once: (images float32 [<= size, C, S, S], labels int64 [<= size]).

        The shares are disjoint and complete. If sizes don't divide, ranks get different numbers of images, maybe none.

        Args:
            chosen: indices on the CPU of the images to evaluate; None: all.
        """
        share = evaluation_share(len(split) if chosen is None else len(chosen), self.rank, self.processes)
        if chosen is not None:
            share = chosen[share]
        parts = torch.split(share, size) if len(share) else ()
        found = self._pixels(split, iter(parts), size)
        for part, (pixels, indices) in zip(parts, found, strict=True):
            yield self._augmented(pixels, indices, Chain(None)), self._labels(split, part)

    @functools.cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        return to_device(torch.tensor(self.mean), self.device), to_device(torch.tensor(self.std), self.device)

    def _augmented(self, pixels: Tensor, indices: Tensor | None, draws: Chain) -> Tensor:
        side = self.config.side_of_crop(pixels.shape[2])
        if side != pixels.shape[2] and not isinstance(draws.crop, ViewDraws):
            pixels, indices = centre(pixels if indices is None else pixels[indices], side), None
        return chained(pixels, indices, draws, *self._statistics, channels_last=self.channels_last)

    def _pixels(
        self,
        split: Split,
        wanted: Iterator[Tensor],
        size: int,
        crop: FileCrop | None = None,
        times: DecodingTimes | None = None,
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield uint8 images on the device, and indices into them or None, for each of ``wanted`` (int64 [n]).

        A data set on the device is yielded whole, with the indices. Otherwise the images at the indices are copied to
        the device one batch ahead. With ``crop``, ``wanted`` are its rows and images are [n, views, C, S, S].
        """
        images = split.images
        if isinstance(images, MemoryImages) and images.pixels.device == self.device:
            return ((images.pixels, to_device(indices, self.device)) for indices in wanted)
        fetched = stream(images, wanted, batch=size, workers=self.config.workers, crop=crop, times=times)
        return ((pixels, None) for pixels in one_ahead(fetched, self.device))

    def _labels(self, split: Split, indices: Tensor) -> Tensor:
        return to_device(split.labels[to_device(indices, split.labels.device)], self.device)

    def _draw(self, generator: torch.Generator, side: int, n: int, views: int) -> list[Chain]:
        """Return the draws for a global batch of ``n`` images, one a view."""
        if views > 1:
            return [Chain(draw_view(generator, n, side, self.config, view)) for view in range(views)]
        return [draw_chain(generator, n, side, self.config)]
