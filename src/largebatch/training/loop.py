"""The training loop: step, log, evaluate, save."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from largebatch.machine import distributed
from largebatch.tracking.console import Console
from largebatch.tracking.recorder import Recorder
from largebatch.training.checkpoint import CheckpointWriter
from largebatch.training.phase import MainPhase
from largebatch.training.profile import StepClock
from largebatch.training.stop import StepBoundary


@dataclass(frozen=True)
class Session:
    """Objects of a run in one process. Only rank 0 has a recorder and a writer."""

    recorder: Recorder | None
    writer: CheckpointWriter | None
    clock: StepClock
    console: Console
    boundary: StepBoundary

    def record(self, row: dict[str, float]) -> None:
        if self.recorder:
            self.recorder.row(row | {"wall_seconds": self.clock.elapsed()})


def loop(phase: MainPhase, session: Session) -> tuple[str, str]:
    """Take the remaining steps of a phase. Return ``finished``, ``diverged`` or ``preempted``, and a message."""
    training, profile, clock = phase.training, phase.profile, session.clock
    batches = phase.batches()
    first_bad_step = torch.full((), math.inf, device=phase.run.device)  # first step with a NaN or infinite loss
    diverged, first_step = False, training.step + 1

    if training.step == phase.start and phase.evaluates_after(training.step):
        session.record(phase.position(training.step) | phase.evaluate())

    while training.step < phase.end and not diverged:
        profile.before_step()
        training.step = step = training.step + 1
        finite = phase.gradient(batches)
        if finite is None:
            session.console.say(
                f"out of memory at step {step}: continuing with micro-batches of {phase.run.batch.micro_batch}"
            )
            training.step = step - 1
            batches = phase.batches()
            continue
        first_bad_step.clamp_(max=torch.where(finite, math.inf, float(step)))
        learning_rates = phase.learning_rates()
        phase.update(session.recorder)
        clock.step(phase.epochs.size(step - phase.start - 1))

        if phase.logs_after(step):
            with profile.phase("logging"):
                metrics = phase.train_metrics() | learning_rates
                if step > first_step:
                    metrics |= clock.speed()
                diverged = not math.isfinite(metrics["train/loss"])
                session.record(phase.position(step) | metrics)
        for line in profile.after_step(step):
            session.console.say(line)
        is_best = False
        if not diverged and phase.evaluates_after(step):
            with clock.paused(), profile.phase("evaluation"):
                metrics = phase.evaluate()
            if not all(map(math.isfinite, metrics.values())):  # before the next training loss shows it
                diverged = True
                first_bad_step.clamp_(max=step)
            is_best = _is_best(phase, metrics)
            session.record(phase.position(step) | metrics)
        stop, save = session.boundary.after_step(step)
        if not diverged and (save or is_best or step == phase.end):
            with profile.phase("checkpoint"):
                _save(phase, session, is_best)
            session.boundary.saved(step)
            if stop and step < phase.end:
                return "preempted", ""
        if step == first_step:
            clock.restart()

    if diverged:
        bad_step = distributed.smallest_over_processes(first_bad_step)
        return "diverged", f"the loss was not finite at step {bad_step:.0f}"
    phase.close()
    return "finished", ""


def _is_best(phase: MainPhase, metrics: dict[str, float]) -> bool:
    """Return True in every process if the model with these metrics is the best so far (``tracker.checkpoints``).

    Validation accuracy decides. Without validation images no model is the best, because the test set must not decide.
    """
    accuracy = metrics.get("val/accuracy")
    if not phase.run.config.tracker.checkpoints or accuracy is None:
        return False
    is_best = distributed.from_rank_0(accuracy > phase.training.best)
    if is_best:
        phase.training.best = accuracy
    return is_best


def _save(phase: MainPhase, session: Session, is_best: bool) -> None:
    """Save a checkpoint. Every process calls this; rank 0 writes, and then holds the totals of all processes."""
    run, training = phase.run, phase.training
    totals = [training.totals, training.probe.totals] if training.probe else [training.totals]
    for tensor in totals:
        distributed.sum_over_processes(tensor)
    if session.recorder and session.writer:
        state = training.state(session.clock.elapsed()) | {"micro_batch": run.batch.micro_batch}
        best = run.folder.best_checkpoint if is_best else None
        session.writer.save(training.step, state, first=session.recorder.layers_to_write(), best=best)
    else:
        for tensor in totals:
            tensor.zero_()
