"""Entry point of a worker: ``python -m largebatch.training.worker RUN_DIR``.

A worker, alone or as one rank of torchrun, reads only the frozen ``config.yaml`` of its run folder. It trains from the
newest checkpoint, or from the start, to the end. Rank 0 writes the folder's files.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch

from largebatch.config.custom import custom_choices
from largebatch.config.identity import identity
from largebatch.config.schema import Config
from largebatch.config.typed import load_config
from largebatch.errors import UserError
from largebatch.machine import distributed
from largebatch.machine.memory import is_out_of_memory
from largebatch.machine.precision import allow_tf32
from largebatch.machine.process import die_with_parent, launcher_is_gone
from largebatch.machine.pulse import expect_no_progress, start_pulse
from largebatch.native import keep_compiled_kernels_private
from largebatch.runs.folder import RESUMES, RunBusyError, RunFolder, checkpoint_path, this_process
from largebatch.terminal import outlive_terminal
from largebatch.tracking.console import Console
from largebatch.tracking.images import save_images
from largebatch.tracking.recorder import Recorder, lacks
from largebatch.training.branching import branch
from largebatch.training.checkpoint import CheckpointWriter, load_checkpoint, load_newest
from largebatch.training.facts import facts_in_words, gather_facts
from largebatch.training.loop import Session, loop
from largebatch.training.micro_batch import too_large_for_memory
from largebatch.training.phase import MainPhase
from largebatch.training.profile import StartClock, StepClock
from largebatch.training.set_up import set_up
from largebatch.training.state import STATE
from largebatch.training.stop import StepBoundary


class FailedRunError(Exception):
    """A run that has begun can't continue, for a clear cause such as an image that has become unreadable."""


def train(
    config: Config,
    folder: RunFolder,
    rank: int,
    processes: int,
    device: torch.device,
    console: Console,
    start: StartClock,
) -> None:
    """Train a run from its newest checkpoint until it finishes, diverges or is asked to stop."""
    saved = _newest_checkpoint(config, folder, rank, device, console)
    start.end("checkpoint")
    phase: MainPhase | None = set_up(config, folder, rank, processes, device, console, saved, start)
    assert phase is not None
    run, training = phase.run, phase.training
    facts = gather_facts(run, training, phase.total_steps) | phase.facts()  # the same at every start
    if saved is not None:
        phase.load(saved, rank)
        saved = None  # free the device's memory
        console.say(f"resumed after step {training.step} of {phase.total_steps}")
    elif config.start_from is not None:
        branch(run, training)
        console.say(f"starts from {config.start_from}: its weights and the state of its optimizer")
    kept = config.checkpoint.kept_steps(run.steps)
    start.end("set-up")
    facts["start_seconds"] = start.seconds
    for line in (*facts_in_words(config, facts), *phase.facts_in_words(facts), str(start)):
        console.say(line)
    if rank == 0 and config.tracker.images and training.step == 0:
        batches = phase.batches()
        save_images(next(batches)[0], config.mode.views, run.data.mean, run.data.std, folder.images)
        batches.close()  # stops the decoding processes too
    with contextlib.ExitStack() as stack:
        recorder, writer = None, None
        if rank == 0:
            recorder = stack.enter_context(Recorder(config, folder, training.step, facts, console))
            writer = stack.enter_context(CheckpointWriter(folder.checkpoints, device, identity(config), kept))
        total_steps = phase.total_steps
        console.start_progress(training.step, total_steps)
        boundary = StepBoundary(config.checkpoint.every_seconds, config.checkpoint.every_steps, rank, kept)
        session = Session(recorder, writer, StepClock(training.seconds, device, run.data.times), console, boundary)
        if training.growing:
            session.show_length(phase)
        state, message = "finished", ""
        while phase is not None and state == "finished":
            try:
                state, message = loop(phase, session)
            except UserError as error:
                if folder.has_progress():
                    raise FailedRunError(str(error)) from error
                raise
            total_steps, phase = phase.total_steps, phase.following()
        expect_no_progress()
        if writer:
            writer.wait()  # before the status is final
        if recorder:
            recorder.finish(state, training.step, message, session.clock.elapsed(), training.checksum())
    if training.growing and state == "finished" and (beyond := sorted(step for step in kept if step > training.step)):
        console.say(f"checkpoint.keep_at={beyond}: not saved, because the training has {training.step} steps")
    console.say(f"{state} after step {training.step} of {total_steps}{f': {message}' if message else ''}")


def _newest_checkpoint(
    config: Config, folder: RunFolder, rank: int, device: torch.device, console: Console
) -> dict[str, Any] | None:
    """Return the newest usable checkpoint, which rank 0 chooses, in every process."""
    saved = None
    if rank == 0:
        saved = load_newest(
            folder.checkpoints, device, console.say, identity(config), partial(lacks, folder), needs=STATE
        )
    step = distributed.from_rank_0(saved["step"] if saved is not None else None)
    if rank > 0 and step is not None:
        saved, _ = load_checkpoint(checkpoint_path(folder.checkpoints, step), device)
    return saved


def main(arguments: list[str]) -> int:
    """Train the run of one folder. Return 0 if it ended without an error, 1 if it failed, 2 if the user can fix it."""
    die_with_parent()
    if launcher_is_gone():
        return 1
    outlive_terminal()
    sys.path.append(os.getcwd())  # last, so that a user's modules are found and replace none
    if len(arguments) != 1:
        print("usage: python -m largebatch.training.worker RUN_DIR", file=sys.stderr)
        return 2
    rank = int(os.environ.get("RANK", "0"))
    start_pulse(rank)
    folder = RunFolder(Path(arguments[0]).absolute())
    start = StartClock()
    start.end("imports")
    try:
        config = load_config(folder.config)
        with folder.hold(patience=2) if rank == 0 else contextlib.nullcontext():
            return _work(config, folder, rank, start)
    except (RunBusyError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _work(config: Config, folder: RunFolder, rank: int, start: StartClock) -> int:
    """Train, and write an error to the status. Return the exit code."""
    try:
        if rank == 0:
            folder.remove_leftovers()
            folder.update_status(state="running", started=time.time(), **this_process())
        _find_own_code(config, folder)
        keep_compiled_kernels_private()
        allow_tf32(config.tf32)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        rank, processes, device = distributed.start(config.cluster.device)
        start.end("device")
        with Console(folder.log, rank == 0) as console:
            train(config, folder, rank, processes, device, console, start)
    except UserError as error:
        return _fail(folder, str(error), exit_code=2)
    except FailedRunError as error:
        return _fail(folder, f"{error}; {RESUMES}", exit_code=1)
    except OSError as error:  # a full disk, a network disk that doesn't answer, a file that is gone
        if (error.errno is None and error.__cause__ is None) or _noted(error):
            traceback.print_exc()
        return _fail(folder, f"{_noted(error)}{error}; {RESUMES}", exit_code=1)
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        if is_out_of_memory(error):
            advice = "a smaller micro_batch, batch_size, model or image needs less memory"
            if config.batch_norm_size:
                advice = too_large_for_memory(config.batch_norm_size, config.cluster.device)
            begun = folder.has_progress()
            message = f"out of memory ({type(error).__name__}: {first_line}); {advice}{f'; {RESUMES}' if begun else ''}"
            return _fail(folder, message, exit_code=1 if begun else 2)
        traceback.print_exc()
        where = f"traceback in {folder.log}; {RESUMES}"
        return _fail(folder, f"{_noted(error)}{type(error).__name__}: {first_line}; {where}", exit_code=1)
    finally:
        distributed.stop()
    return 0


def _find_own_code(config: Config, folder: RunFolder) -> None:
    """Import the user's modules from the copies for queued jobs, if there are any.

    Each copy has one module or package that is in no other import folder, so that it replaces none.

    Raises:
        UserError: an own module isn't there, or has changed since the run got its name.
    """
    choices = custom_choices(config)
    sys.path[:0] = [str(copy) for one in choices if one.version and (copy := folder.code / one.version).is_dir()]
    if problems := [problem for one in choices for problem in one.problems_in_source()]:
        raise UserError("\n".join(problems))


def _noted(error: Exception) -> str:
    """Return the target of an error in the user's own code, to put before the error."""
    notes = (note for note in getattr(error, "__notes__", []) if note.partition("=")[0].endswith(".target"))
    return next((f"{note}: " for note in notes), "")


def _fail(folder: RunFolder, message: str, exit_code: int) -> int:
    """Write the failure to the status, unless another rank did: only the first failure is the cause."""
    if folder.state() != "failed":
        folder.update_status(state="failed", message=message, exit_code=exit_code, ended=time.time())
    return exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
