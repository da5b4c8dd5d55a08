"""The training loop: step, log, evaluate, save, until there is a reason to end."""

from __future__ import annotations

import math
from collections.abc import Generator

import torch
from torch import Tensor

from largebatch.config.schema import Config
from largebatch.data import train_batches
from largebatch.machine import distributed
from largebatch.optim import TVLARS
from largebatch.seeding import derive_seed
from largebatch.tracking.console import Console
from largebatch.tracking.recorder import Recorder
from largebatch.training.checkpoint import CheckpointWriter
from largebatch.training.clock import StepClock
from largebatch.training.evaluation import evaluate
from largebatch.training.profile import Profile
from largebatch.training.saving import keeps_as_best, save_training
from largebatch.training.state import Run, Training
from largebatch.training.step import gradient, update
from largebatch.training.stop import StepBoundary


def loop(
    run: Run,
    training: Training,
    recorder: Recorder | None,
    writer: CheckpointWriter | None,
    clock: StepClock,
    console: Console,
    boundary: StepBoundary,
) -> tuple[Run, str, str]:
    """Step, log, evaluate, save, until there is a reason to end.

    Returns:
        ``run``, maybe with smaller micro-batches, its state and a word on it.
    """
    config, mode = run.config, run.mode
    profile = Profile(run.folder.profile if config.profile and run.rank == 0 else None, run.device, run.steps)
    batches = batches_from(run, training.step)
    first_bad_step = torch.full((), math.inf, device=run.device)  # where a loss was NaN or infinite
    diverged, first_step = False, training.step + 1

    if training.step == 0 and run.evaluates_after(0):
        figures = evaluate(run, training.model)
        if recorder:
            recorder.row({"step": 0, "epoch": 0, "examples": 0, "wall_seconds": clock.elapsed()} | figures)

    while training.step < run.steps and not diverged:
        profile.before_step()
        training.step = step = training.step + 1
        torch.manual_seed(derive_seed(config.seed, "step", step, run.rank))  # dropout; no random state needs saving
        finite, smaller = gradient(run, training, batches, profile)
        if finite is None:
            console.say(f"out of memory at step {step}: micro-batches of {smaller.batch.micro_batch} from here on")
            training.step, run = step - 1, smaller
            batches = batches_from(run, training.step)
            continue
        first_bad_step.clamp_(max=torch.where(finite, math.inf, float(step)))
        rates = learning_rates(config, training.optimizer)
        update(training, recorder, config.tracker.layers_every, profile)
        clock.step()

        where = {"step": step, "epoch": step / run.epoch_steps, "examples": step * config.batch_size}
        if step % config.tracker.log_every == 0 or step == run.steps:
            with profile.phase("logging"):
                figures = mode.train_figures(distributed.sum_over_processes(training.totals).tolist())
                training.totals.zero_()
                figures |= rates | phi(training.optimizer, step)
                if step > first_step:
                    figures |= clock.speed(config.batch_size)
                diverged = not math.isfinite(figures["train/loss"])
                if recorder:
                    recorder.row(where | {"wall_seconds": clock.elapsed()} | figures)
        for line in profile.after_step(step):
            console.say(line)
        is_best = False
        if not diverged and run.evaluates_after(step):
            with clock.paused(), profile.phase("evaluation"):
                figures = evaluate(run, training.model)
            if not all(map(math.isfinite, figures.values())):  # the weights show it before the next training loss does
                diverged = True
                first_bad_step.clamp_(max=step)
            is_best = keeps_as_best(run, training, figures)
            if recorder:
                recorder.row(where | {"wall_seconds": clock.elapsed()} | figures)
        stop, save = boundary.after_step(step)
        if not diverged and (save or is_best or step == run.steps):
            with profile.phase("checkpoint"):
                save_training(run, training, recorder, writer, clock, is_best)
            boundary.saved(step)
            if stop and step < run.steps:
                return run, "preempted", ""
        if step == first_step:
            clock.restart()

    if diverged:
        return (
            run,
            "diverged",
            f"the loss was not finite at step {distributed.smallest_over_processes(first_bad_step):.0f}",
        )
    return run, "finished", ""


def batches_from(run: Run, step: int) -> Generator[tuple[Tensor, Tensor]]:
    """This process's micro-batches from after optimizer step ``step`` on."""
    data, config = run.data, run.config
    return train_batches(
        data.train, config.dataset, data.mean, data.std, batch_size=config.batch_size, rank=run.rank,
        processes=run.processes, micro_batch=run.batch.micro_batch, seed=config.seed, start_step=step,
        device=run.device, channels_last=run.arithmetic.channels_last, two_views=run.mode.VIEWS == 2,
        passes=2 if run.exact and run.batch.accumulation > 1 else 1,
    )  # fmt: skip


def learning_rates(config: Config, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The rate of the next step, and that of biases and norm parameters where they have their own."""
    groups = optimizer.param_groups
    own = {"optim/lr_1d": groups[1]["lr"]} if config.optimizer.lr_1d is not None and len(groups) > 1 else {}
    return {"optim/lr": groups[0]["lr"]} | own


def phi(optimizer: torch.optim.Optimizer, step: int) -> dict[str, float]:
    """TVLARS's factor at optimizer step ``step`` = 1, 2, ..."""
    return {"optim/phi": optimizer.phi(step)} if isinstance(optimizer, TVLARS) else {}
