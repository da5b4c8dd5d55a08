"""``compile``: torch.compile where it is asked for, or pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from largebatch.errors import UserError
from largebatch.machine.trial import trial_images, trial_pass
from largebatch.training.state import Run

_PAYS_FROM = 5_000_000  # images in all (100 epochs of CIFAR): compiling takes half a minute or more

Network = Callable[[Tensor], Tensor]


def compiled(run: Run, replica: nn.Module, model: nn.Module, norms: bool) -> tuple[Network, str]:
    """``replica`` as training shall call it, and what was done in words (none where nothing was asked for or done).

    ``auto`` compiles on GPUs, for runs long enough to pay. Where launches are what a small network waits for, its
    passes are replayed as CUDA graphs (``reduce-overhead``): in one process without accumulation, to which
    ``micro_batch=auto`` may come, and with one pass a step, since gradients must not outlive a replay. A micro-batch is
    taken through forward and backward here, and not in the first step: what ``auto`` can't compile is then trained as
    it is, and says so.

    Args:
        norms: whether hooks measure CLARS's norms; compiled passes wouldn't call them.

    Raises:
        UserError: when ``compile=true`` and it can't be compiled.
    """
    config, device = run.config, run.device
    pays = device.type == "cuda" and run.steps * config.batch_size >= _PAYS_FROM and not norms
    if config.compile is False or (config.compile == "auto" and not pays):
        return replica, ""
    whole = run.processes == 1 and run.batch.accumulation == 1 and config.micro_batch != "auto" and not run.exact
    graphs = device.type == "cuda" and whole
    try:
        network = cast(Network, torch.compile(replica, dynamic=False, mode="reduce-overhead" if graphs else None))
        views = 1 if run.exact else config.mode.views  # at once
        images = trial_images(run.data.image, views * run.batch.micro_batch, run.arithmetic.memory_format, device)
        for _ in range(3 if graphs else 1):  # a graph is captured at the second time
            trial_pass(network, model, images, run.autocast)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if config.compile is True:
            raise UserError(f"compile=true: {config.model.name} can't be compiled here ({reason})") from error
        return replica, f"compile=auto: not compiled, for {config.model.name} can't be ({reason})"
    return network, "compiled" + (", with CUDA graphs" if graphs else "")
