"""The key ``compile``: torch.compile on request, or if it saves time."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from largebatch.errors import UserError
from largebatch.machine.precision import trial_images, trial_pass
from largebatch.training.state import Run

_PAYS_FROM = 5_000_000  # images in total (100 epochs of CIFAR): compiling takes half a minute or more

Network = Callable[[Tensor], Tensor]


def compiled(run: Run, replica: nn.Module, model: nn.Module, norms: bool) -> tuple[Network, str]:
    """Return the network for training, compiled or ``replica`` itself, and a line for the log (may be empty).

    ``auto`` compiles on GPUs, for long runs. CUDA graphs (``reduce-overhead``) save the launch time that limits small
    networks. They need one process and one pass per step, because gradients must not outlive a replay. Accumulation,
    and so ``micro_batch=auto``, excludes them. A trial micro-batch makes compilation fail here and not in the first
    step. With ``auto``, a network that can't be compiled then trains uncompiled.

    Args:
        norms: True if hooks measure CLARS's norms. Compiled passes don't call hooks.

    Raises:
        UserError: if ``compile=true`` and compilation fails.
    """
    config, device = run.config, run.device
    pays = device.type == "cuda" and run.steps * config.batch_size >= _PAYS_FROM and not norms
    if config.compile is False or (config.compile == "auto" and not pays):
        return replica, ""
    whole = run.processes == 1 and run.batch.accumulation == 1 and config.micro_batch != "auto" and not run.exact
    graphs = device.type == "cuda" and whole
    try:
        network = cast(Network, torch.compile(replica, dynamic=False, mode="reduce-overhead" if graphs else None))
        views = 1 if run.exact else config.mode.views  # per pass
        images = trial_images(run.data.image, views * run.batch.micro_batch, run.arithmetic.memory_format, device)
        for _ in range(3 if graphs else 1):  # the second pass captures the graph
            trial_pass(network, model, images, run.autocast)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if config.compile is True:
            raise UserError(
                f"compile=true: can't compile {config.model.name} ({reason}). Fix: compile=false"
            ) from error
        return replica, f"compile=auto: can't compile {config.model.name}, so it trains uncompiled ({reason})"
    return network, "compiled" + (", with CUDA graphs" if graphs else "")
