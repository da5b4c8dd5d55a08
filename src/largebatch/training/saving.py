"""What a checkpoint of a run holds."""

from __future__ import annotations

from dataclasses import asdict

from largebatch.machine import distributed
from largebatch.tracking.recorder import Recorder
from largebatch.training.checkpoint import CheckpointWriter
from largebatch.training.clock import StepClock
from largebatch.training.state import Run, Training


def keeps_as_best(run: Run, training: Training, figures: dict[str, float]) -> bool:
    """Whether to keep the model with these figures as the best so far (``tracker.checkpoints``), in every process.

    Validation accuracy says which is the best. The test set chooses nothing, so without validation images none is.
    """
    accuracy = figures.get("val/accuracy")
    if not run.config.tracker.checkpoints or accuracy is None:
        return False
    is_best = distributed.from_rank_0(accuracy > training.best)
    if is_best:
        training.best = accuracy
    return is_best


def save_training(
    run: Run,
    training: Training,
    recorder: Recorder | None,
    writer: CheckpointWriter | None,
    clock: StepClock,
    is_best: bool,
) -> None:
    """Every process must come here; rank 0 writes, and has the totals of all from then on."""
    totals = [training.totals, training.probe.totals] if training.probe else [training.totals]
    for of_one in totals:
        distributed.sum_over_processes(of_one)
    if recorder and writer:
        how = {"arithmetic": asdict(run.arithmetic), "micro_batch": run.batch.micro_batch}
        state = training.state(clock.elapsed()) | how
        best = run.folder.best_checkpoint if is_best else None
        writer.save(training.step, state, first=recorder.layers_to_write(), best=best)
    else:
        for of_one in totals:
            of_one.zero_()
