"""Mixup and CutMix, as timm's ``Mixup``: pairs of images are mixed, and so are their labels.

The partner of an image is its neighbour in the step's random order: images 2k and 2k + 1 of the global batch are a
pair. timm pairs image i with image n - 1 - i of a process's batch. Both are random pairs, because the order is random.
A pair of neighbours stays in one micro-batch, so the number of processes and the micro-batch change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from largebatch.config.modes import Clf
from largebatch.data.stream import to_device


@dataclass(frozen=True)
class MixDraws:
    """Random numbers of one image in each row; ``draws[a:b]`` is a part of the batch, of whole pairs.

    ``box`` is int32 [N, 4]: first and last + 1 row, first and last + 1 column of the partner's box, for CutMix.
    ``parts`` is float32 [N, 4]: the image's own part in pixels outside the box, the partner's part there, and the parts
    of both labels.
    """

    box: Tensor
    parts: Tensor

    def __getitem__(self, part: slice) -> MixDraws:
        return MixDraws(self.box[part], self.parts[part])

    def to(self, device: torch.device | str) -> MixDraws:
        return MixDraws(*(to_device(table, torch.device(device)) for table in (self.box, self.parts)))


def draw_mixing(seed: int, n: int, side: int, options: Clf) -> MixDraws | None:
    """Return the draws for a global batch of ``n`` images of ``side`` pixels, on the CPU. None if nothing is mixed.

    The mixing ratio lam has the distribution Beta(alpha, alpha). It is drawn once for the batch, for each pair or for
    each image, by ``mix_per``. CutMix's box has the part 1 - lam of the area, is cut off at the edge, and its area
    decides the labels. The last of an odd number of images isn't mixed.
    """
    generator = np.random.default_rng(seed)
    count = {"batch": 1, "pair": n // 2, "image": n // 2 * 2}[options.mix_per]
    is_mixed = generator.random(count) < options.mix_probability
    both = options.mixup > 0 and options.cutmix > 0
    is_cut = generator.random(count) < (options.mix_switch if both else float(options.cutmix > 0))
    alphas = options.mixup, options.cutmix
    drawn = [generator.beta(alpha, alpha, count) if alpha > 0 else np.ones(count) for alpha in alphas]
    lam = np.where(is_mixed, np.where(is_cut, drawn[1], drawn[0]), 1.0)
    is_cut &= is_mixed

    cut = (side * np.sqrt(1 - lam)).astype(np.int64)  # the box's side in pixels
    centre = generator.integers(0, side, (2, count))
    first, last = (centre - cut // 2).clip(0, side), (centre + (cut + 1) // 2).clip(0, side)
    box = np.stack([first[0], last[0], first[1], last[1]], 1) * is_cut[:, None]
    label = np.where(is_cut, 1 - (last - first).prod(0) / side**2, lam)
    pixels = np.where(is_cut, 1.0, lam)
    if (label == 1).all():
        return None
    parts = np.stack([pixels, 1 - pixels, label, 1 - label], 1).astype(np.float32)

    copies = {"batch": n // 2 * 2, "pair": 2, "image": 1}[options.mix_per]
    whole_box, whole_parts = np.zeros((n, 4), np.int32), np.tile(np.array([1, 0, 1, 0], np.float32), (n, 1))
    whole_box[: n // 2 * 2], whole_parts[: n // 2 * 2] = box.repeat(copies, 0), parts.repeat(copies, 0)
    return MixDraws(torch.from_numpy(whole_box), torch.from_numpy(whole_parts))


def soft(labels: Tensor, classes: int) -> Tensor:
    """Convert labels int64 [N] to probabilities of the classes, float32 [N, classes]."""
    return torch.zeros(len(labels), classes, device=labels.device).scatter_(1, labels[:, None], 1.0)


def mixed(images: Tensor, labels: Tensor, draws: MixDraws) -> tuple[Tensor, Tensor]:
    """Mix normalised images, float32 [N, C, S, S], and the probabilities of their classes, float32 [N, classes]."""
    n, side = len(images), images.shape[2]
    partner = torch.arange(n, device=images.device)
    partner[: n // 2 * 2] ^= 1
    own, others, own_label, others_label = draws.parts.unbind(1)
    top, bottom, left, right = draws.box.view(n, 4, 1).unbind(1)
    at = torch.arange(side, dtype=torch.int32, device=images.device)
    rows, columns = (at >= top) & (at < bottom), (at >= left) & (at < right)
    inside = (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)
    own_part = torch.where(inside, 0.0, own.view(n, 1, 1, 1))
    others_part = torch.where(inside, 1.0, others.view(n, 1, 1, 1))
    # Two products and a sum, each rounded: a fused operation could depend on the micro-batch.
    pixels = images * own_part + images[partner] * others_part
    return pixels, labels * own_label[:, None] + labels[partner] * others_label[:, None]
