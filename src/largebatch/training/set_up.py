"""Construction of a run at step 0."""

from __future__ import annotations

from types import ModuleType
from typing import Any, cast

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from largebatch.config.batch import plan_batch
from largebatch.config.schema import Config
from largebatch.data import load_data, steps_per_epoch
from largebatch.data.cache import Say
from largebatch.machine import distributed
from largebatch.machine.precision import Arithmetic, Image, choose_arithmetic
from largebatch.modes import bt, clf
from largebatch.optim import CLARS, SampleNorms
from largebatch.runs.folder import RunFolder
from largebatch.seeding import derive_seed
from largebatch.tracking.console import Console
from largebatch.training.compilation import compiled
from largebatch.training.micro_batch import largest_micro_batch
from largebatch.training.optimization import build_optimizer
from largebatch.training.phase import MainPhase
from largebatch.training.pretraining import Pretraining
from largebatch.training.state import Run, Training, Unlogged

MODES: dict[str, tuple[ModuleType, type[MainPhase]]] = {"clf": (clf, MainPhase), "bt": (bt, Pretraining)}
Saved = dict[str, Any]  # a checkpoint


def set_up(
    config: Config,
    folder: RunFolder,
    rank: int,
    processes: int,
    device: torch.device,
    console: Console,
    saved: Saved | None,
) -> MainPhase:
    """Return the main phase at step 0: data, model, optimizer and schedule, the same in every process.

    All processes agree on the measured values (arithmetic, and a micro-batch that fits). A resumed run takes these
    values from ``saved``.
    """
    data = load_data(config.dataset, config.seed, device, console.say, distributed.processes_here())
    mode, phase = MODES[config.mode.name]
    torch.manual_seed(derive_seed(config.seed, "model"))
    model: nn.Module = mode.build_model(config, data).to(device)
    epoch_steps = steps_per_epoch(len(data.train), config.batch_size)
    steps = config.steps if config.steps is not None else (config.epochs or 0) * epoch_steps

    batch = plan_batch(config.batch_size, processes, config.micro_batch, config.optimizer.samples_together)
    if saved is not None:
        arithmetic = Arithmetic(**saved["arithmetic"])
    else:
        at_once = config.mode.views * batch.micro_batch
        arithmetic = _agreed_arithmetic(config, model, data.image, at_once, rank, device, console.say)
    model = model.to(memory_format=arithmetic.memory_format)
    if config.micro_batch == "auto" and saved is not None:
        batch = plan_batch(config.batch_size, processes, saved["micro_batch"])
    elif config.micro_batch == "auto":
        largest = largest_micro_batch(
            model, batch, config.optimizer.samples_together, data.image, config.mode.views, arithmetic, device,
            bt.kept_bytes(config, batch),
        )  # fmt: skip
        largest = int(distributed.smallest_over_processes(torch.tensor(float(largest))))
        batch = plan_batch(config.batch_size, processes, largest)
    if config.sync_bn:
        model = distributed.synchronise_batch_norm(model, device)
    optimizer = build_optimizer(config, model, epoch_steps, steps)
    norms = None
    if isinstance(optimizer, CLARS):
        norms = SampleNorms(model, config.optimizer.samples_together, parameters=optimizer.layers)
        groups = f"{norms.sample_size} sample{'s' * (norms.sample_size > 1)} at a time"
        console.say(f"gradient norms of {groups} by {norms.method}: {norms.why}")
        if norms.method == "passes":  # one backward pass per group
            batch = plan_batch(config.batch_size, processes, norms.sample_size)

    run = Run(config, folder, rank, processes, device, data, batch, epoch_steps, steps, arithmetic)
    replica = cast(bt.BarlowTwins, model).backbone if run.exact else model
    if not run.averages_afterwards:
        example = torch.zeros(2 * config.mode.views, *data.image, device=device)
        replica = distributed.replicate(replica, example)
    network, how = compiled(run, replica, model, norms is not None)
    if how:
        console.say(how)
    schedule = LambdaLR(optimizer, config.schedule.factor(steps, epoch_steps))
    unlogged = Unlogged(mode.TOTALS, device)
    return phase(run, Training(model, replica, network, optimizer, schedule, norms, unlogged), mode)


def _agreed_arithmetic(
    config: Config, model: nn.Module, image: Image, at_once: int, rank: int, device: torch.device, say: Say
) -> Arithmetic:
    """Return rank 0's choice for passes of ``at_once`` images."""
    chosen = None
    if rank == 0:
        chosen, how = choose_arithmetic(config, model, image, at_once, device)
        if how:
            say(f"{chosen}: the fastest for {config.model.name} here ({how})")
    chosen = distributed.from_rank_0(chosen)
    assert chosen is not None
    return chosen
