"""Mode ``clf``: classification with cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from largebatch.config.modes import Clf
from largebatch.config.schema import Config
from largebatch.data import Data
from largebatch.errors import UserError
from largebatch.models.build import build_model as build_network
from largebatch.models.build import check_batch_norm, tried

# Totals of a micro-batch in training: sum of losses, correct predictions, images.
TOTALS = 3


def build_model(config: Config, data: Data) -> nn.Module:
    """Build the network.

    Raises:
        UserError: if it can't be built, or doesn't fit the images or the size of batch norm.
    """
    network = build_network(config.model, data.num_classes, data.channels, data.image_size)
    logits = tried(config.model, network, data.image)
    if logits.shape != (2, data.num_classes):
        raise UserError(
            f"model.name={config.model.name}: its outputs for two images have the shape {list(logits.shape)}, and "
            f"classification needs {[2, data.num_classes]}. Fix: another model, or other model.options"
        )
    check_batch_norm(config.model, network, data.image, config.batch_norm_size)
    return network


def loss(config: Config, model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of a micro-batch, and its totals [sum of losses, correct, images] in float64.

    With ``mode.label_smoothing`` s, the target of each of C classes is ``s / C``, plus ``1 - s`` times its part of the
    label, as in ``torch.nn.CrossEntropyLoss``. Only training smooths labels; the probe of mode ``bt`` doesn't.

    Args:
        labels: int64 [n], or float32 [n, classes] with mixup and CutMix: the parts of the classes. A prediction is then
            correct if it is the class with the largest part.
    """
    smoothing = config.mode.label_smoothing if isinstance(config.mode, Clf) else 0.0
    logits = model(images).float()
    value = F.cross_entropy(logits, labels, label_smoothing=smoothing) if len(labels) else logits.sum()  # 0: no images
    with torch.no_grad():
        correct = (logits.argmax(dim=1) == (labels.argmax(dim=1) if labels.ndim > 1 else labels)).sum()
        count = torch.full_like(correct, len(labels), dtype=torch.float64)  # filled on the device, without a wait
        totals = torch.stack([value.double() * count, correct.double(), count])
    return value, totals


def train_metrics(totals: list[float]) -> dict[str, float]:
    """Return the logged metrics from totals summed over micro-batches, steps and processes."""
    losses, correct, count = totals
    return {"train/loss": losses / count, "train/accuracy": correct / count}


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> Tensor:
    """Return [loss, top-1 correct, top-5 correct, predicted class] of this process's images, float64 [n, 4]."""
    found = [torch.zeros(0, 4, dtype=torch.float64, device=device)]
    for images, labels in batches:
        logits = model(images).float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        top5 = best == labels[:, None]
        losses = F.cross_entropy(logits, labels, reduction="none")
        found.append(torch.stack([losses.double(), top5[:, 0], top5.any(dim=1), best[:, 0]], dim=1))
    return torch.cat(found)


def evaluation_metrics(split: str, images: Tensor) -> dict[str, float]:
    """Return the logged metrics of ``split`` (``val`` or ``test``) from the result of ``evaluate`` for all images."""
    loss, top1, top5 = images[:, :3].mean(dim=0).tolist()
    return {f"{split}/loss": loss, f"{split}/accuracy": top1, f"{split}/top5": top5}
