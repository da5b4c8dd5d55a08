"""Construction of a run at step 0."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR

from largebatch.config.batch import plan_training
from largebatch.config.epochs import lr_factor, plan_epochs, planned_steps
from largebatch.config.models import CustomModel, TimmModel
from largebatch.config.schema import Config
from largebatch.data import Data, load_data
from largebatch.data.cache import Say
from largebatch.errors import UserError
from largebatch.instruments.gradient_noise import GradientNoise
from largebatch.machine import distributed
from largebatch.machine.precision import Arithmetic, choose_arithmetic, described
from largebatch.models.weights import freeze, is_frozen, load_weights
from largebatch.modes import bt, clf
from largebatch.optim.measured import MeasuredOptimizer
from largebatch.runs.folder import RunFolder
from largebatch.runs.provenance import content_hash
from largebatch.seeding import derive_seed
from largebatch.tracking.console import Console
from largebatch.training.averaging import AveragedWeights, ScheduleFreeWeights
from largebatch.training.compilation import compiled, why_no_graphs
from largebatch.training.curvature import announce, fixed_loss
from largebatch.training.graphs import Graphs
from largebatch.training.loss_scale import LossScale
from largebatch.training.micro_batch import largest_micro_batch
from largebatch.training.optimization import build_optimizer
from largebatch.training.phase import MainPhase
from largebatch.training.pretraining import Pretraining
from largebatch.training.profile import StartClock
from largebatch.training.running_statistics import RunningStatistics
from largebatch.training.state import Run, Training, Unlogged
from largebatch.training.stop import EarlyStopping

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
    start: StartClock | None = None,
) -> MainPhase:
    """Return the main phase at step 0: data, model, optimizer and schedule, the same in every process.

    All processes agree on the arithmetic and on a micro-batch that fits. A run that starts again takes the arithmetic
    from its status, and a resumed run the micro-batch from ``saved``.
    """
    data = load_data(config.dataset, config.seed, device, console.say, distributed.processes_here())
    _check_content(config, folder, data, saved, rank)
    if start is not None:
        start.end("data")
    mode, phase = MODES[config.mode.name]
    torch.manual_seed(derive_seed(config.seed, "model"))
    model: nn.Module = mode.build_model(config, data)
    if saved is None:  # a checkpoint has all weights, so that a resumed run needs no source
        _load_weights(config, model, data, console.say)
    model = model.to(device)
    batch = plan_training(config, processes)
    epochs = plan_epochs(config, len(data.train))
    steps = planned_steps(config, epochs)
    arithmetic = _agreed_arithmetic(config, folder, model, rank, device)
    model = model.to(memory_format=arithmetic.memory_format)
    # Before a micro-batch is tried, because it takes memory, and before hooks, which aren't its own.
    averaged: AveragedWeights | ScheduleFreeWeights | None = None
    if config.ema_decay is not None:
        averaged = AveragedWeights(model, config.ema_decay)
    frozen = copy.deepcopy(model) if config.instruments.sharpness_every else None
    if config.micro_batch == "auto" and saved is not None:
        batch = replace(batch, micro_batch=saved["micro_batch"])
    elif config.micro_batch == "auto":
        largest = largest_micro_batch(
            model, batch, config.batch_norm_size, data.image, config.mode.views, arithmetic, device,
            bt.kept_bytes(config, batch),
        )  # fmt: skip
        largest = int(distributed.smallest_over_processes(torch.tensor(float(largest))))
        batch = replace(batch, micro_batch=largest)
    if config.sync_bn and not config.model.freeze:
        model = distributed.synchronise_batch_norm(model, device)
    if config.model.freeze:
        console.say(f"model.freeze=true: trains {', '.join(freeze(config.model, model))}")
    # The part of the model that takes a micro-batch.
    passed = cast(bt.BarlowTwins, model).backbone if config.mode.loss_over_global_batch else model
    layers = _batch_norm_layers(config, passed, console.say)
    optimizer = build_optimizer(config, model, epochs.steps, steps)
    if ScheduleFreeWeights.fits(optimizer):
        if averaged is not None:
            raise UserError(config.optimizer.two_averages(config))
        averaged = ScheduleFreeWeights(model, optimizer)
    run = Run(config, folder, rank, processes, device, data, batch, epochs, steps, arithmetic)
    replica = passed
    if not run.averages_afterwards:
        example = torch.zeros(2 * config.mode.views, *data.image, device=device)
        replica = distributed.replicate(replica, example)
    norms = None  # attached after the example's backward pass, which would count as samples
    if isinstance(optimizer, MeasuredOptimizer):
        norms = optimizer.MEASURE(model, config.optimizer.samples_together, parameters=optimizer.layers)
        groups = f"{norms.sample_size} sample{'s' * (norms.sample_size > 1)} at a time"
        console.say(f"gradient {norms.QUANTITY} of {groups} by {norms.method}: {norms.why}")
        if norms.method == "passes":  # one backward pass per group
            if norms.sample_size % config.mode.images_together:
                raise UserError(
                    f"optimizer.sample_size={norms.sample_size}: optimizer={config.optimizer.name} measures "
                    f"{norms.QUANTITY} by passes of so many images here, and mode.mixup and mode.cutmix mix pairs of a "
                    f"pass. Fix: optimizer.sample_size={2 * norms.sample_size}, or neither mixup nor cutmix"
                )
            if config.batch_schedule.measures and batch.micro_batch != norms.sample_size:
                raise UserError(
                    f"batch_schedule.small_batch={batch.micro_batch}: optimizer={config.optimizer.name} measures "
                    f"{norms.QUANTITY} by passes of optimizer.sample_size={norms.sample_size} images here. "
                    f"Fix: batch_schedule.small_batch={norms.sample_size}"
                )
            batch = replace(batch, micro_batch=norms.sample_size)
            run = replace(run, batch=batch)
            if layers and batch.group != config.batch_norm_size:
                raise UserError(
                    f"batch_norm_size={config.batch_norm_size}: optimizer={config.optimizer.name} measures "
                    f"{norms.QUANTITY} by passes of "
                    f"optimizer.sample_size={norms.sample_size} images here, and batch norm is over the images of a "
                    f"pass. Fix: batch_norm_size={batch.group}"
                )

    growing = epochs if config.batch_schedule.measures else None
    measured = config.instruments.noise_scale
    noise = GradientNoise(model, cosine=measured) if measured or growing else None
    network = compiled(run, replica, model, norms is not None, console.say)
    why_not = why_no_graphs(run, norms is not None)
    if why_not and device.type == "cuda":
        console.say(f"no CUDA graphs: {why_not}")
    graphs = Graphs(model, device, batch.accumulation > 1, why_not, console.say)
    loss_scale = LossScale(device, enabled=arithmetic.precision == "fp16")
    schedule = LambdaLR(optimizer, lr_factor(config, epochs))
    unlogged = Unlogged(mode.TOTALS, device)
    statistics = RunningStatistics(passed, over_processes=not config.sync_bn)
    stopping = EarlyStopping(config.early_stopping)
    training = Training(
        model, replica, network, graphs, optimizer, schedule, loss_scale, norms, statistics, unlogged, stopping, noise,
        growing=growing, averaged=averaged,
    )  # fmt: skip
    if frozen is not None:
        training.fixed_loss = fixed_loss(run, frozen, model, mode)
        announce(run, training.fixed_loss, optimizer, console.say)
    return phase(run, training, mode)


def _load_weights(config: Config, model: nn.Module, data: Data, say: Say) -> None:
    """Replace the initial weights as ``model.weights`` and ``model.pretrained`` demand; in mode ``bt`` the backbone's.

    Raises:
        UserError: the file is missing or has changed since the run was planned, or the weights don't fit.
    """
    given = config.model.weights
    if given is not None:
        found = content_hash(Path(given)) if Path(given).is_file() else ""
        if found != config.model.weights_hash:
            problem = "has changed since the run was planned" if found else "no such file"
            raise UserError(f"model.weights={given}: {problem}. Fix: restore the file, or start a run with the present")
    network = cast(bt.BarlowTwins, model).backbone if config.mode.name == "bt" else model
    load_weights(config.model, network, data.classes, data.channels, say)


def _check_content(config: Config, folder: RunFolder, data: Data, saved: Saved | None, rank: int) -> None:
    """Keep the data set's digest in the status at the run's first start.

    Raises:
        UserError: if the data set isn't that of the checkpoint, or of rank 0.
    """
    if saved is not None and (difference := data.content.difference(saved["data"])):
        raise UserError(
            f"dataset.root={config.dataset.root}: the run began with another data set. Now: {difference}. "
            f"Fix: restore the data set; or remove {folder.path} to train on the present data from the start"
        )
    if rank == 0:
        folder.update_status(data=data.content.digest)
    if difference := data.content.difference(distributed.from_rank_0(asdict(data.content))):
        raise UserError(
            f"dataset.root={config.dataset.root}: rank {rank} has another data set than rank 0: {difference}. "
            "Fix: give all nodes the same files"
        )


def _batch_norm_layers(config: Config, network: nn.Module, say: Say) -> list[str]:
    """Return the names of the batch-norm layers of ``network``, the part of the model that takes a micro-batch.

    Raises:
        UserError: if there are any in a model that has none by its configuration.
    """
    layers = [name for name, layer in network.named_modules() if isinstance(layer, _BatchNorm) and not is_frozen(layer)]
    name = config.model.name
    if layers and config.batch_norm_size is None:
        raise UserError(
            f"model.name={name}: has batch norm ({layers[0]}), but its configuration says that it has none. "
            "Fix: leave out model.batch_norm=false; for a model of your own, has_batch_norm in config/models.py"
        )
    may_lack = isinstance(config.model, TimmModel | CustomModel) and config.model.batch_norm
    if not layers and config.batch_norm_size and may_lack:
        say(f"{name} has no batch norm: with model.batch_norm=false, any number of processes gives a run the same name")
    return layers


def _agreed_arithmetic(
    config: Config, folder: RunFolder, model: nn.Module, rank: int, device: torch.device
) -> Arithmetic:
    """Return the arithmetic of the run's first start, which its status keeps, or else rank 0's choice."""
    chosen = described(folder.read_status().get("arithmetic")) if rank == 0 else None
    if rank == 0 and chosen is None:
        chosen = choose_arithmetic(config.precision, model, device)
        folder.update_status(arithmetic=asdict(chosen))
    chosen = distributed.from_rank_0(chosen)
    assert chosen is not None
    return chosen
