"""Trial forward and backward pass, to measure its time or memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Image = tuple[int, int, int]  # channels, height, width


def trial_images(image: Image, n: int, memory_format: torch.memory_format, device: torch.device) -> Tensor:
    """Return random images [n, *image]."""
    return torch.randn(n, *image, device=device).contiguous(memory_format=memory_format)


def trial_pass(network: Callable[[Tensor], Tensor], model: nn.Module, images: Tensor, autocast: torch.autocast) -> None:
    """Run ``network`` forward and backward in training mode. The ``model`` inside it is unchanged afterwards."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    model.train()
    try:
        with autocast:
            loss: Tensor = network(images).float().square().mean()
        torch.autograd.backward(loss)
    finally:
        model.zero_grad(set_to_none=True)
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
