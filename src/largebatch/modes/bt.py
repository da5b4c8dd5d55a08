"""Mode ``bt``: Barlow Twins (arXiv 2103.03230), self-supervised pre-training on two views of each image."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from largebatch.config.batch import BatchPlan
from largebatch.config.modes import Bt
from largebatch.config.schema import Config
from largebatch.data import Data
from largebatch.models.build import build_backbone, check_batch_norm

# Totals of a micro-batch: the loss, its two parts, each summed over images, and the number of images.
TOTALS = 4
EPSILON = 1e-5  # added to variances; torch's default, also in the reference program


class Stage(nn.Module):
    """Batch norm, ReLU, and a linear layer without bias: [n, inputs] to [n, outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(inputs, eps=EPSILON)
        self.linear = nn.Linear(inputs, outputs, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        return cast(Tensor, self.linear(F.relu(self.norm(values))))

    def from_standardised(self, values: Tensor) -> Tensor:
        """Do the same as ``forward`` for values that already have mean 0 and variance 1."""
        return cast(Tensor, self.linear(F.relu(values * self.norm.weight + self.norm.bias)))


class Projector(nn.Module):
    """Linear layers of the given widths with batch norm and ReLU between: features [n, F] to embeddings [n, D]."""

    def __init__(self, features: int, widths: list[int]) -> None:
        super().__init__()
        self.first = nn.Linear(features, widths[0], bias=False)
        self.stages = nn.ModuleList(Stage(inputs, outputs) for inputs, outputs in pairwise(widths))

    def forward(self, features: Tensor) -> Tensor:
        values = self.first(features)
        for stage in self.stages:
            values = stage(values)
        return cast(Tensor, values)


class BarlowTwins(nn.Module):
    """Backbone and projector: images [2n, C, H, W], first views and then second, to embeddings [2n, D].

    The two views pass separately. Each view has its own batch statistics, as in the reference program.
    """

    def __init__(self, backbone: nn.Module, features: int, widths: list[int]) -> None:
        super().__init__()
        self.features = features
        self.backbone = backbone
        self.projector = Projector(features, widths)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.projector(self.backbone(view)) for view in images.chunk(2)])


def build_model(config: Config, data: Data) -> BarlowTwins:
    """Build the network.

    Raises:
        UserError: as ``build_backbone``, or if batch norm would get one value per channel, also in fine-tuning.
    """
    mode, size = options(config), config.batch_norm_size
    backbone, features = build_backbone(config.model, data.image)
    check_batch_norm(config.model, backbone, data.image, size)
    if mode.lr_backbone and size is not None:
        images = min(mode.eval_batch_size, len(data.train))
        smallest = images // -(-images // size)  # sizes of groups differ by at most one
        check_batch_norm(config.model, backbone, data.image, smallest, f"mode.eval_batch_size={mode.eval_batch_size}")
    return BarlowTwins(backbone, features, mode.projector)


def options(config: Config) -> Bt:
    """Return the mode's options."""
    return cast(Bt, config.mode)


def kept_bytes(config: Config, batch: BatchPlan) -> int:
    """Return the bytes that a process keeps of all its images: each output of the projector, and one gradient.

    0 if the loss isn't over the global batch.
    """
    if not config.mode.loss_over_global_batch:
        return 0
    widths = options(config).projector
    return 4 * 2 * batch.per_process * (sum(widths) + max(widths))


def barlow_loss(correlation: Tensor, lmbda: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of a cross-correlation matrix C [D, D], its on-diagonal and its off-diagonal part.

    ``loss = sum_i (1 - C_ii)^2 + lmbda * sum_{i != j} C_ij^2``
    """
    diagonal = correlation.diagonal()
    on_diagonal = (1 - diagonal).square().sum()
    off_diagonal = (correlation - torch.diag(diagonal)).square().sum()
    return on_diagonal + lmbda * off_diagonal, on_diagonal, off_diagonal


def loss(config: Config, model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of one micro-batch alone (``mode.exact=false``), and its totals.

    Args:
        images: [2n, C, H, W], first views and then second.
        labels: [n], unused.
    """
    mode = options(config)
    first, second = model(images).float().chunk(2)
    with torch.autocast(images.device.type, enabled=False):
        correlation = standardised(first).mT @ standardised(second) / len(first)
        parts = barlow_loss(correlation, mode.lmbda)
    return mode.loss_scale * parts[0], counted(mode.loss_scale, parts, len(first))


def standardised(values: Tensor) -> Tensor:
    """Return ``values`` [n, D] with mean 0 and variance 1 in each column: batch norm without parameters."""
    variance, mean = torch.var_mean(values, dim=0, correction=0)
    return (values - mean) * torch.rsqrt(variance + EPSILON)


@torch.no_grad()
def counted(scale: float, parts: tuple[Tensor, Tensor, Tensor], images: int) -> Tensor:
    """Return the totals [loss, on-diagonal, off-diagonal, images] of ``images`` images with these loss parts."""
    value, on_diagonal, off_diagonal = parts
    one = torch.ones_like(value)
    return images * torch.stack([scale * value, on_diagonal, off_diagonal, one]).double()


def train_metrics(totals: list[float]) -> dict[str, float]:
    """Return the logged metrics from totals summed over micro-batches, steps and processes."""
    value, on_diagonal, off_diagonal, count = totals
    return {
        "train/loss": value / count,
        "train/on_diagonal": on_diagonal / count,
        "train/off_diagonal": off_diagonal / count,
    }
