"""The training loop: step, log, evaluate, save."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch

from largebatch.machine import distributed
from largebatch.machine.pulse import progressed
from largebatch.runs.folder import RESUMES
from largebatch.runs.metrics import Row
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

    def show_length(self, phase: MainPhase) -> None:
        """Show the run's length in steps, which a growing batch has changed."""
        steps = phase.total_steps
        self.console.set_steps(steps)
        if self.recorder:
            self.recorder.set_length(steps, phase.epochs.examples(steps))

    def record(self, *rows: Row) -> None:
        if self.recorder:
            for row in rows:
                self.recorder.row({"wall_seconds": self.clock.elapsed()} | row)


def loop(phase: MainPhase, session: Session) -> tuple[str, str]:
    """Take the remaining steps of a phase. Return ``finished``, ``diverged`` or ``preempted``, and a message."""
    training, profile, clock = phase.training, phase.profile, session.clock
    batches = phase.batches()
    first_bad_step = torch.full((), math.inf, device=phase.run.device)  # first step with a NaN or infinite loss
    diverged, overflowed, first_step = False, False, training.step + 1
    if training.early_stopping.stops:  # it was killed between the last checkpoint and its outcome
        phase.end = training.step

    if training.step == phase.start and phase.evaluates_after(training.step):
        session.record(phase.position(training.step) | phase.evaluate())
    if training.step == phase.start and phase.measures_after(training.step):
        session.record(phase.position(training.step) | phase.measure())

    while training.step < phase.end and not diverged:
        profile.before_step()
        training.step = step = progressed(training.step + 1)
        finite = phase.gradient(batches)
        if finite is None:
            session.console.say(
                f"out of memory at step {step}: continuing with micro-batches of {phase.run.batch.micro_batch}"
            )
            training.step = step - 1
            batches = phase.batches()
            continue
        first_bad_step.clamp_(max=torch.where(finite, math.inf, float(step)))
        try:
            phase.update(session.recorder)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # Shampoo decomposes products of gradients
            if not _overflows(training.optimizer):
                raise
            diverged = overflowed = True
        clock.step(phase.epochs.size(step - phase.start - 1))
        if phase.grew:
            batches = phase.batches()
            session.show_length(phase)

        mean: list[Row] = []
        each: list[Row] = []  # instead of the mean if the run diverges
        evaluated: list[Row] = []
        if diverged or phase.logs_after(step):
            with profile.phase("logging"):
                mean, each = phase.train_rows()
                mean[0]["wall_seconds"] = clock.elapsed()
                # The first steps wait for the device and for their rows: measure the speed over several steps.
                if step > first_step and (step % phase.run.config.tracker.log_every == 0 or step == phase.end):
                    mean[0] |= clock.speed()
                if not math.isfinite(mean[0]["train/loss"]) or training.loss_scale.vanished:
                    diverged = True
                    first_bad_step.clamp_(max=step)
        for line in profile.after_step(step == phase.end):
            session.console.say(line)
        is_best = False
        if not diverged and phase.evaluates_after(step):
            with clock.paused(), profile.phase("evaluation"):
                metrics = phase.evaluate()
            # Before the next training loss shows it.
            if not all(map(math.isfinite, metrics.values())) or training.loss_scale.vanished:
                diverged = True
                first_bad_step.clamp_(max=step)
                each = each or phase.train_rows()[1]
            is_best = _is_best(phase, metrics)
            evaluated = [phase.position(step) | metrics]
        if not diverged and phase.measures_after(step):
            with clock.paused(), profile.phase("evaluation"):
                evaluated = [(evaluated[0] if evaluated else phase.position(step)) | phase.measure()]
        with profile.phase("logging"):
            session.record(*(each if diverged else mean), *evaluated)
        stop, save = session.boundary.after_step(step)
        if not diverged and (save or is_best or step == phase.end):
            with profile.phase("checkpoint"):
                if _all_finite(phase, first_bad_step):
                    _save(phase, session, is_best)
                else:  # the next row shows the divergence, if there is one
                    diverged = step == phase.end
            session.boundary.saved(step)
            if stop and step < phase.end:
                return "preempted", RESUMES
        if step == first_step:
            clock.restart()

    if diverged:
        if training.loss_scale.vanished:
            return "diverged", f"the gradient was not finite at step {training.step}, at any loss scale"
        bad_step = distributed.smallest_over_processes(first_bad_step)
        if math.isinf(bad_step):  # for example weights that only meet padding
            what = "squares of the gradient" if overflowed else "parameters"
            return "diverged", f"{what} were not finite at step {training.step}"
        return "diverged", f"the loss was not finite at step {bad_step:.0f}"
    phase.close()
    return "finished", training.early_stopping.reason if training.step < phase.total_steps else ""


def _overflows(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if squares of the gradient aren't finite; the same in all processes, which have equal gradients."""
    gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    return not all(bool(one.square().sum().isfinite()) for one in gradients if one is not None)


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


def _all_finite(phase: MainPhase, first_bad_step: torch.Tensor) -> bool:
    """Return True in every process if all losses so far, parameters and buffers are finite in every process.

    Only such a state may replace the finite checkpoints. The check waits for the device, as the checkpoint does.
    """
    training = phase.training
    tensors = [t.detach() for module in training.modules for t in module.state_dict().values() if t.is_floating_point()]
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(tensors, math.inf)])
    bad = first_bad_step.isfinite() | ~norms.isfinite().all()
    return distributed.smallest_over_processes((~bad).float()) > 0


def _save(phase: MainPhase, session: Session, is_best: bool) -> None:
    """Save a checkpoint. Every process calls this; rank 0 writes, and then holds the totals of all processes."""
    run, training = phase.run, phase.training
    totals = [
        training.unlogged.totals,
        *([training.noise.small] if training.noise else []),
        *([training.probe.totals] if training.probe else []),
    ]
    for tensor in totals:
        if tensor.numel():
            distributed.sum_over_processes(tensor)
    if session.recorder and session.writer:
        constant = {
            "micro_batch": run.batch.micro_batch,
            "data": asdict(run.data.content),
            # For the use of the weights without the data set.
            "images": {"shape": list(run.data.image), "mean": list(run.data.mean), "std": list(run.data.std)},
        }
        state = training.state(session.clock.elapsed()) | constant
        best = run.folder.best_checkpoint if is_best else None
        session.writer.save(training.step, state, first=session.recorder.rows_to_write(), best=best)
    else:
        for tensor in totals:
            tensor.zero_()
