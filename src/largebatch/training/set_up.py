"""A run at step 0: data, model, optimizer and schedule, and how its passes are computed."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from largebatch.config.batch import plan_batch, plan_small_batch
from largebatch.config.schema import Config
from largebatch.data import load_data, steps_per_epoch
from largebatch.machine import distributed
from largebatch.machine.precision import Arithmetic, choose_arithmetic
from largebatch.machine.trial import Image
from largebatch.modes import bt, clf
from largebatch.optim import CLARS, SampleNorms
from largebatch.runs.folder import RunFolder
from largebatch.seeding import derive_seed
from largebatch.tracking.console import Console
from largebatch.training.compilation import compiled
from largebatch.training.micro_batch import largest_micro_batch
from largebatch.training.optimization import build_optimizer, schedule_factor, warmup_steps
from largebatch.training.probe import build_probe
from largebatch.training.state import ProbePlan, Run, Training

MODES: dict[str, ModuleType] = {"clf": clf, "bt": bt}


def set_up(
    config: Config,
    folder: RunFolder,
    rank: int,
    processes: int,
    device: torch.device,
    console: Console,
    saved: dict[str, Any] | None,
) -> tuple[Run, Training]:
    """Data, model, optimizer and schedule at step 0, the same in every process.

    What is measured here (the arithmetic, a micro-batch that fits) is agreed on by all; a run that continues from
    ``saved`` computes as it did.
    """
    data = load_data(config.dataset, config.seed, device, console.say, distributed.processes_here())
    batch = plan_batch(config.batch_size, processes, config.micro_batch, config.optimizer.sample_size)
    epoch_steps = steps_per_epoch(len(data.train), config.batch_size)
    steps = config.steps if config.steps is not None else (config.epochs or 0) * epoch_steps
    mode = MODES[config.mode.name]

    torch.manual_seed(derive_seed(config.seed, "model"))
    model: nn.Module = mode.build_model(config, data).to(device)
    at_once = mode.VIEWS * batch.micro_batch
    arithmetic = _arithmetic(config, model, data.image, at_once, device, rank, console, saved)
    model = model.to(memory_format=arithmetic.memory_format)
    run = Run(config, folder, rank, processes, device, mode, data, batch, epoch_steps, steps, arithmetic, None)
    if config.micro_batch == "auto":
        run = run.with_micro_batch(_micro_batch(run, model, saved))
    if config.sync_bn:
        model = distributed.synchronise_batch_norm(model, device)
    optimizer = build_optimizer(config, model, epoch_steps)
    replica = model
    if isinstance(model, bt.BarlowTwins) and run.exact:
        replica = model.backbone  # the rest is computed over the global batch
    elif not run.averages_afterwards:
        replica = distributed.replicate(model, torch.zeros(2 * mode.VIEWS, *data.image, device=device))
    norms = None
    if isinstance(optimizer, CLARS):
        norms = SampleNorms(model, run.sample_size, parameters=optimizer.layers)
        groups = f"{norms.sample_size} sample{'s' * (norms.sample_size > 1)} at a time"
        console.say(f"gradient norms of {groups} by {norms.method}: {norms.why}")
        if norms.method == "passes":  # each backward pass is a group
            run = run.with_micro_batch(norms.sample_size)
    network, how = compiled(run, replica, model, norms is not None)
    if how:
        console.say(how)
    warmup = warmup_steps(config.schedule, epoch_steps)
    schedule = LambdaLR(optimizer, schedule_factor(config.schedule, steps, warmup))
    totals = torch.zeros(mode.TOTALS, dtype=torch.float64, device=device)
    probe = None
    if isinstance(model, bt.BarlowTwins):
        run = replace(run, probe=_probe_plan(run))
        probe = build_probe(run, model)
    return run, Training(model, replica, network, optimizer, schedule, norms, totals, probe)


def _arithmetic(
    config: Config,
    model: nn.Module,
    image: Image,
    at_once: int,
    device: torch.device,
    rank: int,
    console: Console,
    saved: dict[str, Any] | None,
) -> Arithmetic:
    if saved is not None and "arithmetic" in saved:  # the first version's checkpoints have none
        return Arithmetic(**saved["arithmetic"])
    chosen = None
    if rank == 0:
        chosen, how = choose_arithmetic(config, model, image, at_once, device)
        if how:
            console.say(f"{chosen}: the fastest for {config.model.name} here ({how})")
    chosen = distributed.from_rank_0(chosen)
    assert chosen is not None
    return chosen


def _probe_plan(run: Run) -> ProbePlan:
    mode, images = run.config.mode, len(run.data.train)
    assert mode.eval_batch_size is not None
    assert mode.eval_epochs is not None
    batch = plan_small_batch(mode.eval_batch_size, images, run.processes, run.batch.micro_batch)
    return ProbePlan(batch, images // batch.global_batch, mode.eval_epochs)


def _micro_batch(run: Run, model: nn.Module, saved: dict[str, Any] | None) -> int:
    """The one that a resumed run had, or the largest that fits in every process."""
    if saved is not None:
        return int(saved["micro_batch"])
    largest = largest_micro_batch(run, model)
    return int(distributed.smallest_over_processes(torch.tensor(float(largest))))
