"""What a checkpoint of a run holds."""

from __future__ import annotations

from dataclasses import asdict

from largebatch import distributed
from largebatch.checkpoint import CheckpointWriter
from largebatch.clock import StepClock
from largebatch.state import Run, Training
from largebatch.tracking.recorder import Recorder


def save_training(
    run: Run, training: Training, recorder: Recorder | None, writer: CheckpointWriter | None, clock: StepClock
) -> None:
    """Every process must come here; rank 0 writes, and has the totals of all from then on."""
    totals = [training.totals, training.probe.totals] if training.probe else [training.totals]
    for of_one in totals:
        distributed.sum_over_processes(of_one)
    if recorder and writer:
        how = {"arithmetic": asdict(run.arithmetic), "micro_batch": run.batch.micro_batch}
        writer.save(training.step, training.state(clock.elapsed()) | how, first=recorder.layers_to_write())
    else:
        for of_one in totals:
            of_one.zero_()
