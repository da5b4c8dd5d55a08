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

# Multiplications in all forward passes: ResNet-18 with its CIFAR stem for 96 epochs of 45,000 images. Compiled kernels
# then save 16 s on an H200, and more on slower GPUs. Compiling takes half a minute, once for a model and micro-batch.
_PAYS_FROM = 2.4e15

Network = Callable[[Tensor], Tensor]


def compiled(run: Run, replica: nn.Module, model: nn.Module, norms: bool, say: Say) -> Network:
    """Return the network for training, compiled or ``replica`` itself.

    ``compile=auto`` compiles on GPUs, for long runs. A trial micro-batch makes compilation fail here and not in the
    first step. With ``auto``, a network that can't be compiled then trains uncompiled. A run that starts again does as
    at its first start, which its status keeps, because compiled kernels round differently.

    Args:
        norms: True if hooks measure the optimizer's groups of samples. Compiled passes don't call hooks.

    Raises:
        UserError: if compilation fails with ``compile=true``.
    """
    config = run.config
    begun = distributed.from_rank_0(run.folder.read_status().get("compiled") if run.rank == 0 else None)
    wanted = begun if begun is not None else pays(run, model, norms) if config.compile == "auto" else config.compile
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


def pays(run: Run, model: nn.Module, norms: bool) -> bool:
    """Return True if compiling saves more time than it takes: on GPUs, for much computing, without hooks."""
    if run.device.type != "cuda" or norms:
        return False
    return run.epochs.examples(run.steps) * multiplications(model, run) >= _PAYS_FROM


@torch.no_grad()
def multiplications(model: nn.Module, run: Run) -> int:
    """Return the number of multiplications in convolutions and linear layers for one image, with all of its views."""
    counts: list[int] = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        counts.append(output.numel() * layer.weight[0].numel())

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    model.eval()
    model(torch.zeros(run.config.mode.views, *run.data.image, device=next(model.parameters()).device))
    model.train()
    for hook in hooks:
        hook.remove()
    return sum(counts)


def _compiled(run: Run, replica: nn.Module, model: nn.Module) -> Network:
    network = cast(Network, torch.compile(replica, dynamic=False))
    views = 1 if run.exact else run.config.mode.views  # per pass
    images = trial_images(run.data.image, views * run.batch.micro_batch, run.arithmetic.memory_format, run.device)
    trial_pass(network, model, images, run.autocast)
    return network


def why_no_graphs(run: Run, norms: bool) -> str:
    """Return the reason why a run's passes can't be CUDA graphs; empty if they can.

    Args:
        norms: True if hooks measure the optimizer's groups of samples. They keep a count of passes on the host.
    """
    config = run.config
    if run.device.type != "cuda":
        return "they need a GPU"
    if not config.cuda_graphs:
        return "cuda_graphs=false"
    if run.processes > 1:
        return "processes exchange numbers during their passes"
    if norms:
        return "clars, vrlars and vrlamb measure gradients with hooks"
    if config.profile:
        return "profile=true measures forward and backward passes apart"
    if run.within_memory:
        return "micro_batch=auto may repeat a step in smaller micro-batches"
    if run.exact and run.arithmetic.precision == "fp16":
        return "the loss over the global batch contains the loss scale of fp16, which changes"
    return ""
