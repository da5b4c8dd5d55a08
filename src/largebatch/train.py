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
from collections.abc import Generator
from pathlib import Path

import torch
from torch import Tensor

from largebatch import distributed
from largebatch.checkpoint import CheckpointWriter, load_newest
from largebatch.clock import StepClock
from largebatch.config import Config, load_config
from largebatch.data import train_batches
from largebatch.errors import UserError
from largebatch.evaluation import evaluate
from largebatch.facts import facts_in_words, gather_facts
from largebatch.optim import TVLARS
from largebatch.probe import train_probe
from largebatch.process import die_with_parent, launcher_is_gone
from largebatch.profile import Profile
from largebatch.run_folder import RESUMES, RunBusyError, RunFolder, this_process
from largebatch.saving import keeps_as_best, save_training
from largebatch.seeding import derive_seed
from largebatch.set_up import set_up
from largebatch.state import Run, Training
from largebatch.step import gradient, update
from largebatch.stop import StepBoundary
from largebatch.tracking.console import Console
from largebatch.tracking.images import save_images
from largebatch.tracking.recorder import Recorder


def train(config: Config, folder: RunFolder, rank: int, processes: int, device: torch.device, console: Console) -> None:
    """Carry a run from where it stands to its end, a divergence or a request to stop."""
    saved = load_newest(folder.checkpoints, device, console.say)
    run, training = set_up(config, folder, rank, processes, device, console, saved)
    if saved is not None:
        training.load(saved, rank)
        saved = None  # or the device would hold it all the while
        console.say(f"resumed after step {training.step} of {run.total_steps}")
    facts = gather_facts(run, training.model)
    for line in facts_in_words(config, facts):
        console.say(line)
    if rank == 0 and config.tracker.images and training.step == 0:
        batches = batches_from(run, 0)
        save_images(next(batches)[0], run.mode.VIEWS, run.data.mean, run.data.std, folder.images)
        batches.close()  # and with it what decodes ahead
    with contextlib.ExitStack() as stack:
        recorder, writer = None, None
        if rank == 0:
            recorder = stack.enter_context(Recorder(config, folder, training.step, facts, console))
            writer = stack.enter_context(CheckpointWriter(folder.checkpoints, device))
        clock = StepClock(training.seconds, device)
        console.start_progress(training.step, run.total_steps)
        boundary = StepBoundary(config.checkpoint.every_seconds, config.checkpoint.every_steps, rank)
        run, state, message = loop(run, training, recorder, writer, clock, console, boundary)
        if state == "finished" and run.probe:
            state, message = train_probe(run, training, recorder, writer, clock, boundary)
        if writer:
            writer.wait()  # before the status says that the run is over
        if recorder:
            recorder.finish(state, training.step, message, clock.elapsed())
    console.say(f"{state} after step {training.step} of {run.total_steps}{f': {message}' if message else ''}")


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
        with (
            folder.hold(patience=2) if rank == 0 else contextlib.nullcontext(),
            Console(folder.log, rank == 0) as console,
        ):
            return _work(config, folder, rank, console)
    except RunBusyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _work(config: Config, folder: RunFolder, rank: int, console: Console) -> int:
    """Train, and say in the status how it went wrong if it did."""
    if rank == 0:
        folder.update_status(state="running", started=time.time(), **this_process())
    try:
        torch.backends.cudnn.benchmark = not config.deterministic  # all micro-batches have one shape
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
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
