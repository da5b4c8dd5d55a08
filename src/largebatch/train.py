"""The training loop, and the worker's entry: ``python -m largebatch.train RUN_DIR``.

A worker reads nothing but the frozen ``config.yaml`` of its run folder. Alone, or as one rank of torchrun, it trains
from the newest checkpoint (or from the start) to the end and writes the folder's files; rank 0 does the writing.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from largebatch import distributed
from largebatch.batch import BatchPlan, plan_batch
from largebatch.checkpoint import load_newest, save_checkpoint
from largebatch.clock import StepClock
from largebatch.config import Config, load_config
from largebatch.data import Data, eval_batches, load_data, steps_per_epoch, train_batches
from largebatch.errors import UserError
from largebatch.facts import facts_in_words, gather_facts, resolved_precision
from largebatch.modes import clf
from largebatch.optim import CLARS, TVLARS, SampleNorms
from largebatch.optim.layerwise import LayerwiseOptimizer
from largebatch.optimization import build_optimizer, schedule_factor, warmup_steps
from largebatch.process import die_with_parent, launcher_is_gone
from largebatch.run_folder import RESUMES, RunBusyError, RunFolder, this_process
from largebatch.seeding import derive_seed
from largebatch.stop import StepBoundary
from largebatch.tracking.console import Console
from largebatch.tracking.layers import plain_statistics
from largebatch.tracking.recorder import Recorder

MODES: dict[str, ModuleType] = {"clf": clf}
_EVAL_BATCH = (256, 1024)  # images at once: a micro-batch that fits with gradients fits without, within these bounds


@dataclass(frozen=True)
class Run:
    """What stays the same while a run trains, in one of its processes."""

    config: Config
    folder: RunFolder
    rank: int
    processes: int
    device: torch.device
    mode: ModuleType
    data: Data
    batch: BatchPlan
    epoch_steps: int  # optimizer steps an epoch
    steps: int  # in all
    autocast: torch.autocast


@dataclass
class Training:
    """What changes while a run trains; ``state`` is what a checkpoint holds of it."""

    model: nn.Module
    replica: nn.Module  # the same, with gradients averaged over the processes
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    norms: SampleNorms | None  # what CLARS divides by
    totals: Tensor  # of this process, since the last logged row
    step: int = 0
    seconds: float = 0.0  # wall time of the parts before this one

    def state(self, seconds: float) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "totals": self.totals,
            "seconds": seconds,
        }

    def load(self, saved: dict[str, Any], rank: int) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        if rank == 0:  # they are of all processes, and will be summed over all again
            self.totals.copy_(saved["totals"])
        self.step, self.seconds = saved["step"], saved["seconds"]


def train(config: Config, folder: RunFolder, rank: int, processes: int, device: torch.device, console: Console) -> None:
    """Carry a run from where it stands to its end, a divergence or a request to stop."""
    run = prepare(config, folder, rank, processes, device)
    training = set_up(run)
    if training.norms is not None:
        run = with_sample_norms(run, training.norms)
        groups = f"{training.norms.sample_size} sample{'s' * (training.norms.sample_size > 1)} at a time"
        console.say(f"gradient norms of {groups} by {training.norms.method}: {training.norms.why}")
    saved = load_newest(folder.checkpoints, device, console.say)
    if saved is not None:
        training.load(saved, rank)
        console.say(f"resumed after step {training.step} of {run.steps}")
    facts = gather_facts(config, run.data, training.model, run.batch, device, run.steps, run.epoch_steps)
    for line in facts_in_words(config, facts):
        console.say(line)
    with Recorder(config, folder, training.step, facts, console) if rank == 0 else contextlib.nullcontext() as recorder:
        clock = StepClock(training.seconds, device)
        console.start_progress(training.step, run.steps)
        state, message = loop(run, training, recorder, clock)
        if recorder:
            recorder.finish(state, training.step, message, clock.elapsed())
    console.say(f"{state} after step {training.step} of {run.steps}{f': {message}' if message else ''}")


def prepare(config: Config, folder: RunFolder, rank: int, processes: int, device: torch.device) -> Run:
    """Load the data and work out the run's length and how its batches are divided."""
    data = load_data(config.dataset, config.seed)
    batch = plan_batch(config.batch_size, processes, config.micro_batch, config.optimizer.sample_size)
    epoch_steps = steps_per_epoch(len(data.train), config.batch_size)
    steps = config.steps if config.steps is not None else (config.epochs or 0) * epoch_steps
    bf16 = resolved_precision(config, device) == "bf16"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    mode = MODES[config.mode.name]
    return Run(config, folder, rank, processes, device, mode, data, batch, epoch_steps, steps, autocast)


def set_up(run: Run) -> Training:
    """Model, optimizer and schedule at step 0, the same in every process."""
    config = run.config
    torch.manual_seed(derive_seed(config.seed, "model"))
    model: nn.Module = run.mode.build_model(config, run.data).to(run.device)
    if config.sync_bn:
        model = distributed.synchronise_batch_norm(model, run.device)
    optimizer = build_optimizer(config, model, run.epoch_steps)
    example = torch.zeros(2, run.data.channels, run.data.image_size, run.data.image_size, device=run.device)
    replica = distributed.replicate(model, example)
    norms = None
    if isinstance(optimizer, CLARS):
        norms = SampleNorms(model, config.optimizer.sample_size or 1, parameters=optimizer.layers)
    warmup = warmup_steps(config.schedule, run.epoch_steps)
    schedule = LambdaLR(optimizer, schedule_factor(config.schedule, run.steps, warmup))
    totals = torch.zeros(run.mode.TOTALS, dtype=torch.float64, device=run.device)
    return Training(model, replica, optimizer, schedule, norms, totals)


def with_sample_norms(run: Run, norms: SampleNorms) -> Run:
    """The run in micro-batches from which CLARS's norms can be taken."""
    if norms.method == "hooks":
        return run
    return replace(run, batch=plan_batch(run.config.batch_size, run.processes, norms.sample_size))


def loop(run: Run, training: Training, recorder: Recorder | None, clock: StepClock) -> tuple[str, str]:
    """Step, log, evaluate, save, until there is a reason to end. Returns the run's state and a word on it."""
    config, mode = run.config, run.mode
    boundary = StepBoundary(config.checkpoint.every_seconds, config.checkpoint.every_steps, run.rank)
    batches = train_batches(
        run.data.train, config.dataset, run.data.mean, run.data.std, batch_size=config.batch_size, rank=run.rank,
        processes=run.processes, micro_batch=run.batch.micro_batch, seed=config.seed, start_step=training.step,
        device=run.device,
    )  # fmt: skip
    first_bad_step = torch.full((), math.inf, device=run.device)  # where a loss was NaN or infinite
    diverged, first_step = False, training.step + 1

    while training.step < run.steps and not diverged:
        training.step = step = training.step + 1
        torch.manual_seed(derive_seed(config.seed, "step", step, run.rank))  # dropout; no random state needs saving
        finite = forward_backward(run, training.replica, batches, training.totals)
        first_bad_step.clamp_(max=torch.where(finite, math.inf, float(step)))
        lr = training.optimizer.param_groups[0]["lr"]
        update(training, recorder, every=config.tracker.layers_every)
        clock.step()

        where = {"step": step, "epoch": step / run.epoch_steps, "examples": step * config.batch_size}
        if step % config.tracker.log_every == 0 or step == run.steps:
            figures = mode.train_figures(distributed.sum_over_processes(training.totals).tolist())
            training.totals.zero_()
            figures |= {"optim/lr": lr} | phi(training.optimizer, step) | clock.speed(config.batch_size)
            diverged = not math.isfinite(figures["train/loss"])
            if recorder:
                recorder.row(where | {"wall_seconds": clock.elapsed()} | figures)
        if not diverged and (step % (config.eval_every * run.epoch_steps) == 0 or step == run.steps):
            with clock.paused():
                figures = evaluate(run, training.model)
            if not math.isfinite(figures["test/loss"]):  # the weights show it before the next training loss does
                diverged = True
                first_bad_step.clamp_(max=step)
            if recorder:
                recorder.row(where | {"wall_seconds": clock.elapsed()} | figures)
        stop, save = boundary.after_step(step)
        if not diverged and (save or step == run.steps):
            with clock.paused():
                save_training(run, training, recorder, clock)
            boundary.saved(step)
            if stop and step < run.steps:
                return "preempted", ""
        if step == first_step:
            clock.restart()

    if diverged:
        return "diverged", f"the loss was not finite at step {distributed.smallest_over_processes(first_bad_step):.0f}"
    return "finished", ""


def forward_backward(run: Run, replica: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], totals: Tensor) -> Tensor:
    """Gradient of the mean loss over this process's share of a batch; adds to ``totals`` what the mode counts.

    Returns:
        Whether every loss was finite, as a tensor on the device: reading it here would wait for the device.
    """
    replica.train()
    finite = torch.ones((), dtype=torch.bool, device=totals.device)
    accumulation = run.batch.accumulation
    for part in range(accumulation):
        images, labels = next(batches)
        with without_sync(replica, more_to_come=part + 1 < accumulation):
            with run.autocast:
                loss, counted = run.mode.loss(replica, images, labels)
            (loss / accumulation).backward()
        totals += counted
        finite &= loss.detach().isfinite()
    return finite


def without_sync(replica: nn.Module, more_to_come: bool) -> contextlib.AbstractContextManager[None]:
    """Gradients are averaged over processes in the last micro-batch of a step only."""
    if more_to_come and isinstance(replica, DistributedDataParallel):
        return replica.no_sync()
    return contextlib.nullcontext()


def update(training: Training, recorder: Recorder | None, every: int) -> None:
    """One optimizer and schedule step; every so many steps the layers' statistics are recorded."""
    optimizer = training.optimizer
    due = recorder is not None and every > 0 and training.step % every == 0
    layerwise = isinstance(optimizer, LayerwiseOptimizer)
    plain = plain_statistics(training.model) if due and not layerwise else None
    if training.norms is not None and isinstance(optimizer, CLARS):
        optimizer.set_sample_norms(training.norms.means())
    optimizer.step()
    if recorder and plain:
        recorder.layers(training.step, *plain)
    elif recorder and due and isinstance(optimizer, LayerwiseOptimizer):
        recorder.layers(training.step, optimizer.layer_names, optimizer.layer_stats())
    optimizer.zero_grad(set_to_none=True)
    training.schedule.step()


def phi(optimizer: torch.optim.Optimizer, step: int) -> dict[str, float]:
    """TVLARS's factor at optimizer step ``step`` = 1, 2, ..."""
    return {"optim/phi": optimizer.phi(step)} if isinstance(optimizer, TVLARS) else {}


def evaluate(run: Run, model: nn.Module) -> dict[str, float]:
    """Figures on the whole validation and test sets, over all processes."""
    distributed.share_buffers(model)
    model.eval()
    size = min(max(run.batch.micro_batch, _EVAL_BATCH[0]), _EVAL_BATCH[1])
    figures: dict[str, float] = {}
    for name, split in (("val", run.data.val), ("test", run.data.test)):
        if split is None:
            continue
        batches = eval_batches(
            split, run.data.mean, run.data.std, rank=run.rank, processes=run.processes, batch=size,
            device=run.device, workers=run.config.dataset.workers,
        )  # fmt: skip
        with run.autocast:
            totals = run.mode.evaluate(model, batches, run.device)
        figures |= run.mode.evaluation_figures(name, distributed.sum_over_processes(totals).tolist())
    return figures


def save_training(run: Run, training: Training, recorder: Recorder | None, clock: StepClock) -> None:
    distributed.sum_over_processes(training.totals)
    if recorder:
        recorder.before_checkpoint()
        save_checkpoint(run.folder.checkpoints, training.step, training.state(clock.elapsed()))
    else:
        training.totals.zero_()  # rank 0 has all of it now


def main(arguments: list[str]) -> int:
    """Carry out the run of one folder. Exit code 0: ended as its state says; 1: failed; 2: the user can mend it."""
    die_with_parent()
    if launcher_is_gone():
        return 1
    if len(arguments) != 1:
        print("usage: python -m largebatch.train RUN_DIR", file=sys.stderr)
        return 2
    folder = RunFolder(Path(arguments[0]).absolute())
    config = load_config(folder.config)
    rank = int(os.environ.get("RANK", "0"))
    try:
        with folder.hold() if rank == 0 else contextlib.nullcontext(), Console(folder.log, rank == 0) as console:
            return _work(config, folder, rank, console)
    except RunBusyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _work(config: Config, folder: RunFolder, rank: int, console: Console) -> int:
    """Train, and say in the status how it went wrong if it did."""
    if rank == 0:
        folder.update_status(state="running", started=time.time(), **this_process())
    try:
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        rank, processes, device = distributed.start(config.cluster.device)
        train(config, folder, rank, processes, device, console)
    except UserError as error:
        return _fail(folder, str(error), exit_code=2)
    except Exception as error:
        traceback.print_exc()
        advice = "; a smaller micro_batch needs less memory" if isinstance(error, torch.OutOfMemoryError) else ""
        first_line = str(error).partition("\n")[0]
        where = f"traceback in {folder.log}; {RESUMES}"
        return _fail(folder, f"{type(error).__name__}: {first_line}{advice}; {where}", exit_code=1)
    finally:
        distributed.stop()
    return 0


def _fail(folder: RunFolder, message: str, exit_code: int) -> int:
    """The first rank to fail has the cause; what the others see is its consequence."""
    if folder.state() != "failed":
        folder.update_status(state="failed", message=message, exit_code=exit_code, ended=time.time())
    return exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
