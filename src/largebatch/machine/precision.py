"""Number format and memory format of a run: a rule on ``precision``, the network and the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

Image = tuple[int, int, int]  # channels, height, width

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SMALL = 1_000_000  # parameters; see choose_arithmetic
_BF16_FROM = (8, 0)  # CUDA compute capability with bf16 tensor cores


@dataclass(frozen=True)
class Arithmetic:
    """Number format ``precision`` and memory format of images and convolutions.

    ``precision`` is fp32, or the half-precision format of ``torch.autocast``: bf16 or fp16.
    """

    precision: str
    channels_last: bool

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, _HALF.get(self.precision), enabled=self.precision in _HALF)

    def __str__(self) -> str:
        return self.precision + (", channels last" if self.channels_last else "")


def described(kept: Any) -> Arithmetic | None:
    """Return the arithmetic of which a file keeps the ``asdict``, or None if the file keeps something else."""
    known = (Arithmetic(precision, last) for precision in ("fp32", *_HALF) for last in (False, True))
    return next((one for one in known if asdict(one) == kept), None)


def choose_arithmetic(precision: str, model: nn.Module, device: torch.device) -> Arithmetic:
    """Return the arithmetic for ``precision``: auto, fp32, bf16 or fp16.

    ``auto`` is bf16 on GPUs that have tensor cores for bf16, fp16 on older GPUs, and fp32 on CPU. Networks with
    convolutions compute in channels last.

    Networks of less than a million parameters train in seconds. For them, ``auto`` is fp32 and the memory format is
    contiguous: results then agree to 1e-5 over any number of processes.
    """
    small = sum(p.numel() for p in model.parameters()) < _SMALL
    if precision == "auto":
        precision = "fp32" if small else _precision_of(device)
    convolves = any(isinstance(layer, nn.Conv2d) for layer in model.modules())
    return Arithmetic(precision, channels_last=convolves and not small)


def _precision_of(device: torch.device) -> str:
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= _BF16_FROM else "fp16"


def allow_tf32(allowed: bool) -> None:
    """Let fp32 matrix products and convolutions on GPUs round their inputs to TF32, or forbid it."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def trial_images(image: Image, n: int, memory_format: torch.memory_format, device: torch.device) -> Tensor:
    """Return random images [n, *image]."""
    return torch.randn(n, *image, device=device).contiguous(memory_format=memory_format)


def trial_pass(network: Callable[[Tensor], Tensor], model: nn.Module, images: Tensor, autocast: torch.autocast) -> None:
    """Run ``network`` forward and backward in training mode; leave ``model``, which it calls, unchanged."""
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


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
