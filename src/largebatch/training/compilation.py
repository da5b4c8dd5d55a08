"""The keys ``compile`` and ``cuda_graphs``: runs with kernels of torch.compile, and runs without graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from largebatch.data.cache import Say
from largebatch.errors import UserError
from largebatch.machine import distributed
from largebatch.machine.precision import trial_images, trial_pass
from largebatch.training.state import Run

_PAYS_FROM = 5_000_000  # images in total (100 epochs of CIFAR): compiling takes half a minute

Network = Callable[[Tensor], Tensor]


def compiled(run: Run, replica: nn.Module, model: nn.Module, norms: bool, say: Say) -> Network:
    """Return the network for training, compiled or ``replica`` itself.

    ``compile=auto`` compiles on GPUs, for long runs. A trial micro-batch makes compilation fail here and not in the
    first step. With ``auto``, a network that can't be compiled then trains uncompiled. A run that starts again does as
    at its first start, which its status keeps, because compiled kernels round differently.

    Args:
        norms: True if hooks measure CLARS's norms. Compiled passes don't call hooks.

    Raises:
        UserError: if compilation fails with ``compile=true``.
    """
    config = run.config
    begun = distributed.from_rank_0(run.folder.read_status().get("compiled") if run.rank == 0 else None)
    wanted = begun if begun is not None else pays(run, norms) if config.compile == "auto" else config.compile
    network: Network = replica
    if wanted:
        problem = ""
        try:
            network = _compiled(run, replica, model)
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if distributed.any_process(bool(problem)):
            network, problem = replica, problem or "in another process"
            if config.compile is True:
                raise UserError(f"compile=true: can't compile {config.model.name} ({problem}). Fix: compile=false")
            say(f"compile=auto: can't compile {config.model.name}, so it trains uncompiled ({problem})")
        else:
            say("compiled")
    if run.rank == 0 and begun is None:
        run.folder.update_status(compiled=network is not replica)
    return network


def pays(run: Run, norms: bool) -> bool:
    """Return True if compiling saves more time than it takes: on GPUs, for long runs."""
    return run.device.type == "cuda" and run.steps * run.config.batch_size >= _PAYS_FROM and not norms


def _compiled(run: Run, replica: nn.Module, model: nn.Module) -> Network:
    network = cast(Network, torch.compile(replica, dynamic=False))
    views = 1 if run.exact else run.config.mode.views  # per pass
    images = trial_images(run.data.image, views * run.batch.micro_batch, run.arithmetic.memory_format, run.device)
    trial_pass(network, model, images, run.autocast)
    return network


def why_no_graphs(run: Run, norms: bool) -> str:
    """Return the reason why a run's passes can't be CUDA graphs; empty if they can.

    Args:
        norms: True if hooks measure CLARS's norms. They keep a count of passes on the host.
    """
    config = run.config
    if run.device.type != "cuda":
        return "they need a GPU"
    if not config.cuda_graphs:
        return "cuda_graphs=false"
    if run.processes > 1:
        return "processes exchange numbers during their passes"
    if norms:
        return "clars measures norms with hooks"
    if config.profile:
        return "profile=true measures forward and backward passes apart"
    if run.within_memory:
        return "micro_batch=auto may repeat a step in smaller micro-batches"
    if run.exact and run.arithmetic.precision == "fp16":
        return "the loss over the global batch contains the loss scale of fp16, which changes"
    return ""
